"""Tasks from the hub, which a stand-in for `datasets.load_dataset` gives: the hub itself is not reached from tests."""

import json

import pytest

pytest.importorskip("datasets")
import datasets

from fastroberta.errors import DataError
from fastroberta.finetune import main
from fastroberta.tasks.hub import download_task
from fastroberta.tasks.tables import read_table
from fastroberta.tasks.task import GLUE, find_task, list_columns

WORDS = {"sentence": "A\tlong\nday.", "sentence1": "One.", "sentence2": "Two.", "question1": "Who?", "question2": "Why?",
         "premise": "It rains.", "hypothesis": "It is wet.", "question": "Where?"}  # fmt: skip
TEXTS = {"qqp": ("question1", "question2"), "mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"),
         "cola": ("sentence",), "sst2": ("sentence",)}  # fmt: skip
CLASSES = {"mnli": ["entailment", "neutral", "contradiction"], "qnli": ["entailment", "not_entailment"],
           "rte": ["entailment", "not_entailment"]}  # fmt: skip


def make_glue(name):
    """A task as the hub has it: labels are numbers with names, and -1 where they are kept secret."""
    columns = TEXTS.get(name, ("sentence1", "sentence2"))
    label = datasets.Value("float32") if name == "stsb" else datasets.ClassLabel(names=CLASSES.get(name, ["no", "yes"]))
    features = datasets.Features({**{column: datasets.Value("string") for column in columns}, "label": label})
    parts = ("_matched", "_mismatched") if name == "mnli" else ("",)
    splits = ["train", *(f"{split}{part}" for split in ("validation", "test") for part in parts)]

    def make(split):
        labels = [-1, -1] if split.startswith("test") else [0, 1]
        return datasets.Dataset.from_dict({**{c: [WORDS[c]] * 2 for c in columns}, "label": labels}, features=features)

    return datasets.DatasetDict({split: make(split) for split in splits})


def load(path, name=None):
    if path == "nyu-mll/glue":
        return make_glue(name)
    if path.startswith("rajpurkar/squad"):
        record = {"id": "a", "context": "Anna came.", "question": "Who came?"}
        records = [
            {**record, "answers": {"text": ["Anna"], "answer_start": [0]}},
            {**record, "id": "b", "question": "Who left?", "answers": {"text": [], "answer_start": []}},
        ]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(records) for split in ("train", "validation")})
    record = {
        "example_id": "high1",
        "article": "Anna came.",
        "question": "Who?",
        "options": ["Anna", "Ben"],
        "answer": "A",
    }
    splits = ("train", "validation", "test")
    return datasets.DatasetDict({split: datasets.Dataset.from_list([record]) for split in splits})


@pytest.mark.parametrize("name", [name.lower() for name in GLUE])
def test_files_of_glue_are_the_archives(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load)
    download_task(name, tmp_path)
    task = find_task(name, tmp_path)
    for path in (task.train, task.dev, *task.scored.values()):
        table = read_table(path, task.header)
        table.require(list_columns(task, with_label=True), "")
        labels = [record[task.label] for record in table.records]
        assert labels == {"sts-b": ["0.0", "1.0"]}.get(name, CLASSES.get(name, ["0", "1"])[:2])
    assert len(task.predicted) == (2 if name == "mnli" else 1)
    for path in task.predicted.values():
        table = read_table(path)
        table.require(["index", *list_columns(task, with_label=False)], "")
        assert task.label not in table.records[0]
    if name == "cola":
        assert read_table(task.dev, task.header).records[0]["sentence"] == "A long day."


def test_squad_and_race(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("squad", "squad2", "race"):
        download_task(name, tmp_path / name)
    squad, race = find_task("squad2", tmp_path / "squad2"), find_task("race", tmp_path / "race")
    answered, unanswered = read_table(squad.train).records
    assert answered["answers"] == {"text": ["Anna"], "answer_start": [0]} and unanswered["answers"]["text"] == []
    (record,) = read_table(race.train).records
    assert (record["choices"], record["label"]) == (["Anna", "Ben"], "A") and set(race.scored) == {"test"}


def test_a_hub_out_of_reach_is_named_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    arguments = [str(checkpoint), "--task", "rte", "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"nyu-mll/glue/rte: .* gave no data \(no route to host\); give .* by --data$"):
        main(arguments)
    assert not list(tmp_path.glob("out*"))


def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load)
    download_task("squad", tmp_path / "squad")
    path = tmp_path / "squad" / "train-v1.1.json"
    path.write_text(json.dumps({"data": []}))
    download_task("squad", tmp_path / "squad")
    assert json.loads(path.read_text()) == {"data": []}
