"""ONNX files: the same outputs as PyTorch at any shape, for each head; int8 measured; nothing left where it fails."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")
pytest.importorskip("seqeval")
from fastroberta.cli.program import run
from fastroberta.corpus.tokenizer import SpecialTokenIds, load_tokenizer
from fastroberta.export import main
from fastroberta.finetune import main as finetune
from fastroberta.tasks import onnx_export, onnx_heldout
from fastroberta.tasks.metrics import list_predictions
from fastroberta.tasks.onnx_heldout import compare_examples, compare_masks, compute_logits, read_held_out
from fastroberta.tasks.task import load_task

transformers = pytest.importorskip("transformers")
onnxruntime = pytest.importorskip("onnxruntime")

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
    assert held_out["examples"] >= 2 and 0 <= held_out["agreement"] <= 1 and set(held_out["scores"]) == set(size)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("MB in int8", "tokens/s in fp32", "the same prediction for", "accuracy"))
    assert not list((tmp_path / "out").glob("fp32*"))
    result = subprocess.run([sys.executable, "-c", ALONE, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


def test_scores_are_those_of_fine_tuning(checkpoint, tmp_path):
    """Read as in fine-tuning: its columns, its length, its metrics."""
    pytest.importorskip("accelerate")
    rows = [
        "good,Anna gives Ben a book and Ben thanks Anna for the book,x",
        "bad,Paris,y",
        "bad,Ben,x",
        "good,the,France",
    ]
    (tmp_path / "dev.csv").write_text("\n".join(["class,first,second", *rows]))
    words = [str(checkpoint), "--train", str(tmp_path / "dev.csv"), "--dev", str(tmp_path / "dev.csv"), "--text", "first",
             "--pair", "second", "--label", "class", "--metric", "f1", "--max_seq_length", "9", "--epochs", "1",
             "--out", str(tmp_path / "tuned"), "--precision", "fp32", "--kernels", "false"]  # fmt: skip
    assert finetune(words) == 0
    expected = json.loads((tmp_path / "tuned" / "result.json").read_text())["runs"][0]["dev"]
    model = tmp_path / "tuned" / "model"
    held_out = export(model, tmp_path / "out", "--quantize", "int8", "--file", str(tmp_path / "dev.csv"))["held_out"]
    assert (held_out["metric"], held_out["examples"]) == ("f1", 4)
    assert held_out["scores"]["fp32"] == pytest.approx(expected)
    assert set(held_out["scores"]["int8"]) == set(expected)
    assert load_task(model).max_length == 9


class TorchSession:
    """A model of PyTorch in the place of an ONNX session; with another sign, its predictions are others."""

    def __init__(self, model, sign=1):
        self.model, self.sign = model, sign

    def run(self, names, inputs):
        with torch.no_grad():
            outputs = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return [self.sign * outputs[name].numpy() for name in names]


CONTEXT = "Anna gives Ben a book and Ben thanks Anna."
TEXTS = ["Anna", "Ben thanks Anna for the book and France", "Paris", "the capital of France"]
PAIRS = [{"sentence1": text, "sentence2": "Ben"} for text in TEXTS]
LABELS = {"id2label": {0: "B-PER", 1: "O", 2: "B-LOC"}}


@pytest.mark.parametrize(
    ("kind", "head", "settings", "records", "label"),
    [
        ("classification", "SequenceClassification", {}, PAIRS, "label"),
        ("regression", "SequenceClassification", {"num_labels": 1}, [{"text": text} for text in TEXTS], "label"),
        ("multi-label", "SequenceClassification", {"problem_type": "multi_label_classification", **LABELS},
         [{"sentence": text} for text in TEXTS], "label"),
        ("tokens", "TokenClassification", LABELS, [{"words": text.split()} for text in TEXTS], "tags"),
        ("question-answering", "QuestionAnswering", {},
         [{"context": CONTEXT, "question": question} for question in ("Who?", "Why thanks?")], "answers"),
        ("multiple-choice", "MultipleChoice", {},
         [{"text": text, "question": "_ is here.", "choices": ["Anna", "the book", "Paris"]} for text in TEXTS], "label"),
    ],
)  # fmt: skip
def test_every_kind_is_scored_before_and_after(add_head, tmp_path, monkeypatch, kind, head, settings, records, label):
    monkeypatch.setattr(onnx_heldout, "BATCH_TOKENS", 24)  # several batches
    directory = add_head(head, **settings)
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(directory).eval()
    outputs = ["start_logits", "end_logits"] if head == "QuestionAnswering" else ["logits"]
    sessions = {"fp32": TorchSession(model), "int8": TorchSession(model, -1)}

    def read():
        (tmp_path / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_held_out(tmp_path / "dev.jsonl", directory, model, head, load_tokenizer(directory))

    # Without labels: what the model predicts. With its own predictions for labels: a perfect score.
    plain = read()
    assert plain.task.kind == kind and "scores" not in compare_examples(sessions, outputs, plain, 1)
    logits = compute_logits(sessions["fp32"], outputs, plain.part.features, 1)
    for feature, row in zip(plain.part.features, logits, strict=True):  # each as if it were alone
        alone = compute_logits(sessions["fp32"], outputs, [feature], 1)[0]
        np.testing.assert_allclose(row[tuple(map(slice, alone.shape))], alone, atol=1e-5)
    for record, said in zip(records, list_predictions(kind, plain.labels, plain.part, logits), strict=True):
        answer = {"text": [said], "answer_start": [CONTEXT.find(said)]}
        record[label] = {"tokens": said.split(), "question-answering": answer}.get(kind, said)
    result = compare_examples(sessions, outputs, read(), 1)
    assert result["examples"] == len(records) and result.get("agreement", 0) < 1
    assert ("agreement" in result) == (kind != "regression")
    scores = {name: of_one[result["metric"]] for name, of_one in result["scores"].items()}
    assert scores["fp32"] == pytest.approx(1, abs=1e-3) and scores["int8"] < 0.9


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
    result = compare_masks({"fp32": right, "int8": wrong}, sequences, special)
    assert result["examples"] == right.masked == 1 + 1 + 3
    assert result["scores"]["fp32"]["accuracy"] == 1
    # The only word of the first text is at place 1.
    assert result["scores"]["int8"]["accuracy"] == result["agreement"] <= 0.8


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
        (None, ["--format", "onnx", "--file", "t.txt"], 2, "file = t.txt: held-out data are for int8 only"),
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
        ("QuestionAnswering", "text\tlabel\na\t0\n", 3, "dev.tsv: no column 'context', it has text, label; name its"),
        (
            "SequenceClassification",
            "text\tlabel\na\tmaybe\n",
            3,
            "dev.tsv:2: the training file has no label 'maybe', it has no, yes",
        ),
        ("SequenceClassification", "words\tlabel\na\t0\n", 3, "no column 'text', it has words, label; name its"),
        ("SequenceClassification", "text\tlabel\na\n", 3, "dev.tsv:2: expected 2 fields, as in the header, found 1"),
        ("SequenceClassification", "", 3, "dev.tsv: contains no records"),
        ("SequenceClassification", None, 3, "dev.tsv: cannot be read"),
        ("MaskedLM", None, 3, "dev.tsv: cannot be read"),
    ],
)
def test_held_out_data_that_do_not_suit_are_refused(checkpoint, add_head, tmp_path, capsys, head, text, code, message):
    if text is not None:
        (tmp_path / "dev.tsv").write_text(text)
    arguments = ["--format", "onnx", "--quantize", "int8", "--file", str(tmp_path / "dev.tsv")]
    directory = checkpoint if head == "MaskedLM" else add_head(head)
    assert run(lambda: main([str(directory), str(tmp_path / "out"), *arguments])) == code
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["dev.tsv"] * (text is not None)


def test_a_missing_package_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run(lambda: main([str(checkpoint), str(tmp_path / "out"), "--format", "onnx"])) == 2
    assert "needs onnxscript; pip install 'fastroberta[onnx]'" in capsys.readouterr().err
