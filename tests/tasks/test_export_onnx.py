"""ONNX files: the same outputs as PyTorch at any shape, for each head; int8 measured; nothing left where it fails."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastroberta.cli.program import run
from fastroberta.corpus.tokenizer import SpecialTokenIds
from fastroberta.export import main
from fastroberta.tasks import onnx_export
from fastroberta.tasks.onnx_agreement import compare_predictions
from fastroberta.tasks.texts import read_labelled_texts

transformers = pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ALONE = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import onnxruntime, tokenizers
ids = tokenizers.Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode("Anna gives Ben a<mask>.").ids
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
print(session.run(None, {"input_ids": [ids], "attention_mask": [[1] * len(ids)]})[0].shape[1] == len(ids))
"""


def export(checkpoint, out, *arguments):
    assert main([str(checkpoint), str(out), "--format", "onnx", *arguments]) == 0
    return json.loads((out / "onnx.json").read_text())


@pytest.mark.parametrize(
    "head", ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]
)
def test_outputs_are_those_of_pytorch(checkpoint, add_head, tmp_path, head):
    directory = checkpoint if head == "MaskedLM" else add_head(head)
    report = export(directory, tmp_path / "out")
    assert report["head"] == head and report["largest_difference"] < 1e-4
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(directory).eval()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, choices, length in ((1, 2, 1), (4, 3, 32), (2, 4, 9)):
        shape = (batch, choices, length) if head == "MultipleChoice" else (batch, length)
        input_ids = torch.randint(4, model.config.vocab_size, shape)
        attention_mask = torch.ones_like(input_ids)
        if batch > 1:
            input_ids[0, ..., -3:], attention_mask[0, ..., -3:] = 1, 0
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        with torch.no_grad():
            expected = model(**inputs)
        found = session.run(report["outputs"], {name: tensor.numpy() for name, tensor in inputs.items()})
        assert list(expected) == report["outputs"]
        for name, output in zip(report["outputs"], found):
            torch.testing.assert_close(torch.from_numpy(output), expected[name], atol=1e-4, rtol=1e-4)


def test_int8_is_smaller_and_measured_and_loads_alone(checkpoint, tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_text("Anna gives Ben a book.\nThe capital of France is Paris.\n")
    report = export(checkpoint, tmp_path / "out", "--quantize", "int8", "--file", str(file))
    size, speed, held_out = report["bytes"], report["tokens_per_second"], report["held_out"]
    assert size["int8"] == (tmp_path / "out" / "model.onnx").stat().st_size < size["fp32"]
    assert min(speed["fp32"], speed["int8"]) > 0
    assert held_out["predictions"] >= 2 and 0 <= held_out["agreement"] <= 1 and set(held_out["accuracy"]) == set(size)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("MB in int8", "tokens/s in fp32", "the same prediction for", "accuracy"))
    assert not list((tmp_path / "out").glob("fp32*"))
    result = subprocess.run([sys.executable, "-c", ALONE, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


def test_labelled_texts_give_accuracy(add_head, tmp_path):
    directory = add_head("SequenceClassification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = ["Anna gives Ben a book", "Paris", '"Ben" thanks Anna', "the capital of France"]
    with torch.no_grad():
        labels = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    labels[0] = 1 - labels[0]
    file = tmp_path / "dev.tsv"
    file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in zip(texts, labels)))
    assert read_labelled_texts(str(file)) == (texts, [str(label) for label in labels])  # quotes are kept
    report = export(directory, tmp_path / "out", "--quantize", "int8", "--file", str(file))
    assert report["held_out"]["predictions"] == 4 and report["held_out"]["accuracy"]["fp32"] == 0.75
    file.write_text("sentence1\tlabel\tsentence2\nAnna\tyes\tBen\n")
    assert read_labelled_texts(str(file)) == ([("Anna", "Ben")], ["yes"])


class FakeSession:
    """Predicts every token as `base` plus its place, and is wrong at one place."""

    def __init__(self, wrong):
        self.wrong, self.masked = wrong, 0

    def run(self, _, inputs):
        ids = inputs["input_ids"]
        self.masked += int((ids == 4).sum())
        places = np.tile(np.arange(ids.shape[1]) + 5, (len(ids), 1))
        places[:, self.wrong] = 4
        return [np.eye(40)[places]]


def test_accuracy_and_agreement_count_masked_tokens_only():
    special = SpecialTokenIds(0, 1, 2, 3, 4)
    sequences = [[0, *range(6, 6 + length), 2] for length in (1, 5, 19)]  # token 5 + place at each place
    right, wrong = FakeSession(wrong=0), FakeSession(wrong=1)
    result = compare_predictions({"fp32": right, "int8": wrong}, "MaskedLM", sequences, special)
    assert result["predictions"] == right.masked == 1 + 1 + 3
    assert result["accuracy"]["fp32"] == 1
    assert result["accuracy"]["int8"] == result["agreement"] <= 0.8  # the only word of the first text is at place 1


def test_another_output_is_refused_and_leaves_nothing(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0)
    assert run(lambda: main([str(checkpoint), str(tmp_path / "out"), "--format", "onnx"])) == 6
    message = capsys.readouterr().err.splitlines()[-1]
    assert "in onnxruntime, logits differs by" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("head", "arguments", "code", "message"),
    [
        (None, ["--quantize", "int8"], 2, "quantize = int8: only an ONNX file is quantized"),
        (None, ["--format", "onnx", "--file", "t.txt"], 2, "file = t.txt: held-out texts are for int8 only"),
        (
            "NextSentencePrediction",
            [],
            6,
            "its architecture is RobertaForNextSentencePrediction; this works for masked LM",
        ),
        ("SequenceClassification", [], 6, "has no weights for classifier.dense.bias"),
        ("bert", [], 6, "model_type is bert; this works for roberta, xlm-roberta, camembert, data2vec-text"),
        ("no tokenizer", [], 2, "no tokenizer.json"),
        ("no config", [], 6, "has no config.json"),
        ("no weights", [], 6, "transformers cannot load it"),
        ("damaged", [], 6, "transformers cannot load it"),
    ],
)
def test_what_cannot_be_exported_is_refused(checkpoint, tmp_path, capsys, head, arguments, code, message):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    if head == "bert":
        (copy / "config.json").write_text(json.dumps({**config, "model_type": head}))
    elif head == "damaged":
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-100])
    elif head and head.startswith("no "):
        for pattern in {"tokenizer": ("*token*", "vocab.json"), "config": ("config.json",), "weights": ("model.*",)}[
            head.removeprefix("no ")
        ]:
            for path in copy.glob(pattern):
                path.unlink()
    elif head:
        (copy / "config.json").write_text(json.dumps({**config, "architectures": [f"RobertaFor{head}"]}))
    assert run(lambda: main([str(copy), str(tmp_path / "out"), *(arguments or ["--format", "onnx"])])) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("head", "text", "code", "message"),
    [
        ("QuestionAnswering", "text\tlabel\na\t0\n", 2, "no input for question answering"),
        (
            "SequenceClassification",
            "text\tlabel\na\tmaybe\n",
            3,
            "label 'maybe' is unknown to the model, which has no, yes",
        ),
        ("SequenceClassification", "words\tlabel\na\t0\n", 3, "its columns are words, label; name them sentence"),
        ("SequenceClassification", "text\tlabel\na\n", 3, "dev.tsv:2: expected 2 fields, as in the header, found 1"),
        ("SequenceClassification", "", 3, "dev.tsv: contains no records"),
        ("SequenceClassification", None, 3, "dev.tsv: cannot be read"),
    ],
)
def test_texts_that_do_not_suit_are_refused(add_head, tmp_path, capsys, head, text, code, message):
    if text is not None:
        (tmp_path / "dev.tsv").write_text(text)
    arguments = ["--format", "onnx", "--quantize", "int8", "--file", str(tmp_path / "dev.tsv")]
    assert run(lambda: main([str(add_head(head)), str(tmp_path / "out"), *arguments])) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["dev.tsv"] * (text is not None)


def test_a_missing_package_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run(lambda: main([str(checkpoint), str(tmp_path / "out"), "--format", "onnx"])) == 2
    assert "needs onnxscript; pip install 'fastroberta[onnx]'" in capsys.readouterr().err
