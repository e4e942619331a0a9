"""Questions on texts: SQuAD's spans and scores, RACE's choices."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("accelerate")
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.errors import ConfigurationError, DataError
from fastroberta.finetune import main
from fastroberta.tasks.choices import encode_choices
from fastroberta.tasks.examples import Examples, Question
from fastroberta.tasks.questions import (
    Answer,
    choose_answers,
    choose_threshold,
    encode_questions,
    score_answers,
    settle_answer,
)  # fmt: skip
from fastroberta.tasks.tables import read_table
from fastroberta.tasks.task import find_task, load_task

FAST = ["--learning_rate", "5e-3", "--precision", "fp32", "--device", "cpu", "--train_batch_size", "8"]
CONTEXT = "Anna gives Ben a book and Ben thanks Anna for the book."


def write_squad(path, questions):
    """A file of SQuAD: question, text, and answer, or None for a question without one."""
    paragraphs = []
    for number, (question, context, answer) in enumerate(questions):
        one = {"id": f"q{number}", "question": question, "answers": [], "is_impossible": answer is None}
        if answer is not None:
            one["answers"] = [{"text": answer, "answer_start": context.index(answer)}]
        paragraphs.append({"context": context, "qas": [one]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))


def write_race(folder, passages):
    for number, (article, question, options, answer) in enumerate(passages):
        file = folder / ("middle" if number % 2 else "high") / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "id": file.name,
            "article": article,
            "questions": [question],
            "options": [options],
            "answers": [answer],
        }
        file.write_text(json.dumps(content))


def encode(checkpoint, directory, questions, max_length=32, stride=8):
    write_squad(directory / "train-v2.0.json", questions)
    write_squad(directory / "dev-v2.0.json", questions)
    task = find_task("squad2", directory)
    return encode_questions(read_table(task.train), task, load_tokenizer(checkpoint), max_length, stride)


def test_windows_cover_the_text_and_know_the_answer(checkpoint, tmp_path):
    answer = "thanks Anna"
    part = encode(checkpoint, tmp_path, [("Who?", CONTEXT * 4, answer), ("Why?", CONTEXT, None)])
    windows = [feature for feature in part.features if feature["question"] == 0]
    assert len(windows) > 2 and all(len(feature["input_ids"]) <= 32 for feature in windows)
    covered = set().union(*(range(*span) for feature in windows for span in feature["offsets"] if span))
    assert {place for place, character in enumerate(CONTEXT * 4) if character != " "} <= covered
    with_answer = [feature for feature in windows if feature["labels"] != [0, 0]]
    assert with_answer and len(with_answer) < len(windows)
    for feature in with_answer:
        first, last = feature["labels"]
        assert (CONTEXT * 4)[feature["offsets"][first][0] : feature["offsets"][last][1]] == answer
    assert all(feature["labels"] == [0, 0] for feature in part.features if feature["question"] == 1)
    assert [question.answers for question in part.questions] == [[answer], []]


def test_the_best_span_over_all_windows(checkpoint, tmp_path):
    part = encode(checkpoint, tmp_path, [("Who?", CONTEXT * 4, "thanks Anna")])
    logits = np.zeros((len(part.features), 2, 32))
    window = next(index for index, feature in enumerate(part.features) if feature["labels"] != [0, 0])
    first, last = part.features[window]["labels"]
    logits[window, 0, first] = logits[window, 1, last] = 3.0
    logits[window, 0, last + 1] = 5.0  # begins after every good end
    logits[window, 0, 1] = logits[window, 1, 1] = 9.0  # lies in the question
    logits[:, :, 0] = 1.0
    logits[0, :, 0] = 0.5  # the window that says "no answer" least decides
    answer = choose_answers(part, logits)[0]
    best = max(6.0, 5.0 + 0.0)
    assert answer.text == "thanks Anna"
    assert answer.doubt == pytest.approx(1.0 - best)


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("The  Eiffel-Tower!", ["eiffeltower"], 1, 1),  # case, articles, punctuation and spaces do not count
        ("in Paris", ["Paris", "in Paris, France"], 0, 0.8),  # the better of two: precision 1, recall 2/3
        ("book book", ["a book"], 0, 2 / 3),  # a word is found as often as it is there
        ("Rome", ["Paris"], 0, 0),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
    ],
)
def test_exact_match_and_f1(text, answers, exact, f1):
    part = Examples([], 0, [Question("q", "", answers)])
    scores = score_answers(part, [Answer(text, 0.0)], math.inf)
    assert (scores["exact"], scores["f1"]) == (exact, pytest.approx(f1))


def test_threshold_is_the_best_of_all():
    generator = np.random.default_rng(3)
    questions = [Question(str(n), "", ["Paris"] if n % 3 else []) for n in range(30)]
    doubts = generator.normal(size=30).round(1) + [0.0 if n % 3 else 1.0 for n in range(30)]
    answers = [Answer("Paris" if n % 4 else "Rome", float(doubts[n])) for n in range(30)]
    part = Examples([], 0, questions)
    chosen = score_answers(part, answers, choose_threshold(part, answers))["f1"]
    every = [score_answers(part, answers, threshold)["f1"] for threshold in [-99.0, *doubts]]
    assert chosen == pytest.approx(max(every))
    assert choose_threshold(Examples([], 0, questions[1:3]), answers[1:3]) == math.inf
    assert (settle_answer(Answer("Paris", 1.0), 1.0), settle_answer(Answer("Paris", 1.1), 1.0)) == ("Paris", "")


def test_squad_learns_and_writes_what_its_scorer_takes(learner, tmp_path):
    questions = [("Who gives?", f"{word} {CONTEXT}", "Ben") for word in ("Paris", "France", "The book", "Ben thanks")]
    questions += [("Why thanks?", f"{word} {CONTEXT}", None) for word in ("Paris", "France")]
    for part, copies in (("train", 8), ("dev", 1)):
        write_squad(tmp_path / f"{part}-v2.0.json", questions * copies)
    out = tmp_path / "out"
    arguments = [str(learner), "--task", "squad2", "--data", str(tmp_path), "--out", str(out), "--epochs", "6", *FAST]
    assert main(arguments) == 0
    dev = json.loads((out / "result.json").read_text())["runs"][0]["dev"]
    assert dev["f1"] > 0.6 and math.isfinite(dev["no_answer_threshold"])
    answers = json.loads((out / "predictions.json").read_text())
    assert list(answers) == [f"q{number}" for number in range(6)]
    found = [answers[f"q{number}"] for number in range(6)]
    right = [answer or "" for _, _, answer in questions]
    assert np.mean([a == b for a, b in zip(found, right)]) == pytest.approx(dev["exact"])
    lines = (out / "predictions.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == found
    saved = load_task(out / "model")
    assert saved.no_answer_threshold == dev["no_answer_threshold"] and saved.kind == "question-answering"


def test_race_learns_and_scores_both_parts(learner, tmp_path):
    pairs = (("Anna", "Ben"), ("Ben", "Paris"), ("Paris", "Anna"), ("Anna", "Paris"))
    passages = [
        (f"{word} and {other}.", "_ is here.", ["France"] * place + [word] + ["the book"] * (3 - place), "ABCD"[place])
        for place, (word, other) in enumerate(pairs)
    ]
    write_race(tmp_path / "train", passages * 8)
    write_race(tmp_path / "dev", passages)
    write_race(tmp_path / "test", passages)
    task = find_task("race", tmp_path)
    part = encode_choices(read_table(task.dev), task, load_tokenizer(learner), 32)
    tokenizer = load_tokenizer(learner)
    assert part.features[0]["input_ids"][0] == tokenizer.encode("Anna and Ben.", "Anna is here.").ids
    assert [feature["labels"] for feature in part.features] == [0, 2, 1, 3]  # the files of high, then of middle
    out = tmp_path / "out"
    arguments = [str(learner), "--task", "race", "--data", str(tmp_path), "--out", str(out), "--epochs", "4", *FAST]
    assert main(arguments) == 0
    run = json.loads((out / "result.json").read_text())["runs"][0]
    assert run["dev"]["accuracy"] > 0.7
    assert set(run) >= {"test", "test-middle", "test-high"}
    parts = [run[f"test-{part}"]["accuracy"] for part in ("middle", "high")]
    assert run["test"]["accuracy"] == pytest.approx(np.mean(parts))
    assert set((out / "predictions.tsv").read_text().split()[3::2]) <= set("ABCD")


def test_wrong_questions_are_refused(checkpoint, tmp_path):
    (tmp_path / "train-v2.0.json").write_text('{"data": [{"title": "t"}]}')
    (tmp_path / "dev-v2.0.json").write_text("{}")
    with pytest.raises(DataError, match=r"train-v2.0.json: not in SQuAD's format \(KeyError: 'paragraphs'\)"):
        read_table(tmp_path / "train-v2.0.json")
    with pytest.raises(DataError, match=r"train-v1.1.json: no such file; --data takes the directory of squad"):
        find_task("squad", tmp_path)
    for part in ("train", "dev"):
        write_squad(tmp_path / f"{part}-v2.0.json", [("Who?", CONTEXT, "Anna")])
    arguments = [str(checkpoint), "--task", "squad2", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *FAST]
    with pytest.raises(ConfigurationError, match="stride = 30: too much for 32 tokens; give 8 or less"):
        main([*arguments, "--stride", "30"])
    task = find_task("squad2", tmp_path)
    record = {"question": "Who?", "context": CONTEXT, "answers": {"text": ["Anna"], "answer_start": [1]}}
    (tmp_path / "own.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"own.jsonl:1: answer 'Anna' does not stand at character 1"):
        encode_questions(read_table(tmp_path / "own.jsonl"), task, load_tokenizer(checkpoint), 32, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "E"}, r"own.jsonl:1: label 'E' names none of the 2 choices"),
        ({"choices": ["one"]}, r"own.jsonl:1: choices is no list of two texts or more"),
        ({"text": " "}, r"own.jsonl:1: text or question holds no text"),
    ],
)
def test_wrong_choices_are_refused(checkpoint, tmp_path, change, message):
    for name in ("train", "dev"):
        (tmp_path / name).mkdir()
    record = {"text": "Anna", "question": "Who?", "choices": ["Anna", "Ben"], "label": 0} | change
    (tmp_path / "own.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        encode_choices(read_table(tmp_path / "own.jsonl"), find_task("race", tmp_path), load_tokenizer(checkpoint), 32)
