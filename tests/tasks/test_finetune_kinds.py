"""Tags of words and several labels per text: read, learned, scored, and used in transformers' pipelines."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.errors import DataError
from fastroberta.finetune import main
from fastroberta.tasks.examples import IGNORED_LABEL, encode_table, list_labels
from fastroberta.tasks.finetune_loss import make_loss, weigh_classes
from fastroberta.tasks.metrics import score_predictions
from fastroberta.tasks.tables import read_table
from fastroberta.tasks.task import Task

FAST = ["--epochs", "8", "--learning_rate", "5e-3", "--precision", "fp32", "--device", "cpu"]
CONLL = """-DOCSTART- -X- O O

Anna NNP B-NP B-PER
gives VB B-VP O
Ben NNP B-NP B-PER
a DT B-NP O
book NN I-NP O

The DT B-NP O
capital NN I-NP O
Paris NNP B-NP B-LOC
"""


def run_task(checkpoint, directory, train, *more):
    """Train and score on the same file; the directory of the result, and the result."""
    out = directory / "out"
    assert main([str(checkpoint), "--train", train, "--dev", train, "--out", str(out), *FAST, *more]) == 0
    return out, json.loads((out / "result.json").read_text())


def define(path, kind, text="text", label="label"):
    return Task("made", kind, text, None, label, "f1", path, path)


def test_words_of_conll_columns(checkpoint, tmp_path):
    path = tmp_path / "train.conll"
    path.write_text(CONLL)
    table = read_table(path)
    assert [record["words"] for record in table.records] == [
        ["Anna", "gives", "Ben", "a", "book"],
        ["The", "capital", "Paris"],
    ]
    assert table.numbers == [3, 9]
    task = define(path, "tokens", "words", "tags")
    labels = list_labels(table, task)
    assert labels == ["B-LOC", "B-PER", "O"]
    tokenizer = load_tokenizer(checkpoint)
    first = encode_table(table, task, tokenizer, labels, 32).features[0]
    # The same tokens as in running text, and a label at the first token of each word only.
    assert first["input_ids"] == tokenizer.encode("Anna gives Ben a book").ids
    assert [one for one in first["labels"] if one != IGNORED_LABEL] == [1, 2, 1, 2, 2]
    assert first["labels"][0] == first["labels"][-1] == IGNORED_LABEL
    path.write_text("\ufeff-DOCSTART- O\n\n10\u00a0000\tB-NUM \r\n \nBen O\n", encoding="utf-8")
    assert [record["words"] for record in read_table(path).records] == [["10\u00a0000"], ["Ben"]]
    path.write_text("Anna B-PER\nBen\n")
    with pytest.raises(DataError, match=r"train.conll:2: one column; a line begins with a word and ends with its tag"):
        read_table(path)
    (tmp_path / "train.jsonl").write_text('{"words": ["Anna", "gives"], "tags": ["O"]}\n')
    with pytest.raises(DataError, match=r"train.jsonl:1: 2 words and 1 tags"):
        encode_table(read_table(tmp_path / "train.jsonl"), task, tokenizer, ["O"], 32)


def test_tokens_learn_and_their_model_works_in_a_pipeline(learner, tmp_path):
    transformers = pytest.importorskip("transformers")
    train = tmp_path / "train.conll"
    train.write_text(CONLL * 12)
    (tmp_path / "new.jsonl").write_text(json.dumps({"words": ["Anna", "gives", "Ben", "a", "book"] * 8}) + "\n")
    out, result = run_task(
        learner, tmp_path, str(train), "--kind", "tokens", "--predict", str(tmp_path / "new.jsonl"),
        "--class_weights", "--label_smoothing", "0.1", "--train_batch_size", "4",
    )  # fmt: skip
    assert result["runs"][0]["dev"]["f1"] > 0.9
    assert result["truncated"] == {"predictions": 1}
    tags = (out / "predictions.tsv").read_text().splitlines()[1].split("\t")[1].split(" ")
    assert len(tags) == 40 and tags[-1] == "O" and tags[0] == "B-PER"  # a tag for words that were cut off, too
    tag = transformers.pipeline("token-classification", model=str(out / "model"), device="cpu")
    found = {one["start"]: one["entity"] for one in tag("Anna gives Ben a book", ignore_labels=[])}
    assert {start: found[start] for start in (0, 5, 11)} == {0: "B-PER", 5: "O", 11: "B-PER"}


def test_spans_are_scored_whole():
    labels = ["B-PER", "I-PER", "O"]
    expected = np.array([[0, 1, 2, 0, IGNORED_LABEL], [0, 2, 2, 2, 2]])
    predicted = np.array([[0, 2, 2, 0, 0], [0, 2, 2, 2, 2]])  # one of three spans is half found
    scores = score_predictions("tokens", np.eye(3)[predicted], expected, labels)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(8 / 9)


def test_several_labels(learner, tmp_path):
    transformers = pytest.importorskip("transformers")
    rows = [("Anna thanks", "person"), ("Paris France", "place"), ("Anna Paris", "person, place"), ("the book", "")]
    train = tmp_path / "train.tsv"
    train.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows * 12))
    out, result = run_task(learner, tmp_path, str(train), "--kind", "multi-label", "--class_weights")
    assert result["labels"] == ["person", "place"]
    assert result["runs"][0]["dev"]["f1"] > 0.9
    lines = (out / "predictions.tsv").read_text().split("\n")
    assert lines[3] == "2\tperson,place"
    classify = transformers.pipeline("text-classification", model=str(out / "model"), device="cpu", top_k=None)
    assert all(one["score"] > 0.5 for one in classify(["Anna Paris"])[0])
    assert not (out / "confusion.png").exists()


def test_a_single_label_may_be_a_number(checkpoint, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": "Anna", "label": one}) + "\n" for one in (0, [0, 1], "1", None, [])))
    table, task = read_table(path), define(path, "multi-label")
    labels = list_labels(table, task)
    found = encode_table(table, task, load_tokenizer(checkpoint), labels, 16)
    assert labels == ["0", "1"]
    assert [feature["labels"] for feature in found.features] == [[1, 0], [1, 1], [0, 1], [0, 0], [0, 0]]


def test_several_labels_are_scored_and_weighed():
    expected = np.array([[1, 0], [1, 1], [0, 0]])
    logits = np.array([[2.0, -1.0], [2.0, -1.0], [1.0, -3.0]])
    scores = score_predictions("multi-label", logits, expected, ["a", "b"])
    assert scores["f1"] == pytest.approx(2 / 3)  # 2 right, 1 too many, 1 missed
    assert scores["accuracy"] == pytest.approx(1 / 3)
    labels = torch.tensor(expected).float()
    weights = weigh_classes("multi-label", labels.tolist(), 2)
    assert weights.tolist() == [0.5, 2.0]
    outputs = type("Outputs", (), {"logits": torch.tensor(logits).float()})
    loss = make_loss("multi-label", weights, 0.0)(outputs, labels)
    expected_loss = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(outputs.logits, labels)
    torch.testing.assert_close(loss, expected_loss)
