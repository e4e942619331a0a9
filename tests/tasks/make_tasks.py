"""Small made-up tasks in the formats of SQuAD, RACE and CoNLL, to try fine-tuning on without any download.

    python tests/tasks/make_tasks.py DIRECTORY

writes DIRECTORY/squad, DIRECTORY/race and DIRECTORY/ner. Every sentence says who did what where; questions ask for one of
the three, choices are of its sort, and tags mark persons and places. Names of the dev data occur in the training data, their
combinations do not repeat.
"""

import itertools
import json
import random
import sys
from pathlib import Path

PEOPLE = ["Anna", "Ben", "Carla Stone", "David", "Emma Wood", "Felix"]
PLACES = ["Paris", "Oslo", "New York", "Rome", "the old library", "the garden"]
DEEDS = [("found", "a key"), ("sold", "a lamp"), ("read", "a long letter"), ("lost", "a coat"), ("drew", "a map"),
         ("wrote", "a song")]  # fmt: skip
DAYS = ["On Monday", "In spring", "Last year", "At noon", "Once", "Yesterday"]
CHOICES = 4
NUM_DEV = 200


def make_facts(seed=1):
    """All combinations, shuffled: person, deed, thing, place, day."""
    facts = [(who, *deed, where, day) for who, deed, where, day in itertools.product(PEOPLE, DEEDS, PLACES, DAYS)]
    random.Random(seed).shuffle(facts)
    return facts


def write_squad(directory, facts):
    """One question on each sentence; its answer is the person, the thing or the place."""
    paragraphs = []
    for number, (who, verb, thing, where, day) in enumerate(facts):
        context = f"{day} {who} {verb} {thing} in {where}."
        base = {"found": "find", "sold": "sell", "lost": "lose", "drew": "draw", "wrote": "write"}.get(verb, verb)
        question, answer = [
            (f"Who {verb} {thing}?", who),
            (f"What did {who} {base}?", thing),
            (f"Where did {who} {base} {thing}?", where),
        ][number % 3]
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        paragraphs.append({"context": context, "qas": [{"id": str(number), "question": question, "answers": answers}]})
    directory.mkdir(parents=True, exist_ok=True)
    for part, some in (("dev", paragraphs[:NUM_DEV]), ("train", paragraphs[NUM_DEV:])):
        content = {"version": "1.1", "data": [{"title": "made up", "paragraphs": some}]}
        (directory / f"{part}-v1.1.json").write_text(json.dumps(content))


def write_race(directory, facts):
    """A blank for the person or the place, and four choices of the same sort."""
    generator = random.Random(2)
    for number, (who, verb, thing, where, day) in enumerate(facts):
        question, answer, sort = [
            (f"_ {verb} {thing}.", who, PEOPLE),
            (f"{who} {verb} {thing} in _.", where, PLACES),
        ][number % 2]
        options = [answer, *generator.sample([one for one in sort if one != answer], CHOICES - 1)]
        generator.shuffle(options)
        passage = {
            "id": str(number),
            "article": f"{day} {who} {verb} {thing} in {where}.",
            "questions": [question],
            "options": [options],
            "answers": ["ABCD"[options.index(answer)]],
        }
        folder = directory / ("dev" if number < NUM_DEV else "train") / ("middle" if number % 3 else "high")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(json.dumps(passage))


def write_ner(directory, facts):
    """A word and its tag per line."""
    blocks = []
    for who, verb, thing, where, day in facts:
        names = {who: "PER", where: "LOC"}
        lines = []
        for part in (day, who, verb, thing, "in", where, "."):
            for place, word in enumerate(part.split()):
                tag = f"{'I' if place else 'B'}-{names[part]}" if part in names else "O"
                lines.append(f"{word} {tag}")
        blocks.append("\n".join(lines) + "\n")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "dev.conll").write_text("\n".join(blocks[:NUM_DEV]))
    (directory / "train.conll").write_text("\n".join(blocks[NUM_DEV:]))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_squad(root / "squad", make_facts())
    write_race(root / "race", make_facts())
    write_ner(root / "ner", make_facts())
