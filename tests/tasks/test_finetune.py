"""Fine-tuning as a program: data in, one training per seed, files out, and one line for what cannot be used."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
from fastroberta.cli.arguments import parse_arguments
from fastroberta.errors import CheckpointError, ConfigurationError, DataError
from fastroberta.finetune import main
from fastroberta.tasks import finetune_speed
from fastroberta.tasks.examples import Examples, make_collate
from fastroberta.tasks.finetune_settings import FinetuneConfig

FAST = ["--epochs", "2", "--learning_rate", "3e-3", "--precision", "fp32", "--device", "cpu"]
TEXTS = [
    ("Paris is the capital", "place"),
    ("Anna thanks Ben", "person"),
    ("France and Paris", "place"),
    ("Ben, Anna", "person"),
]

NEW = [text + mark * count for count, mark in enumerate("!?.,") for text, _ in TEXTS]


def write_csv(path, rows, header):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture
def data(tmp_path):
    """Files whose label depends on the words, so that it can be learned."""
    write_csv(tmp_path / "train.csv", [TEXTS[i % 4] for i in range(48)], ["text", "label"])
    for name in ("dev", "test"):
        write_csv(tmp_path / f"{name}.csv", TEXTS, ["text", "label"])
    write_csv(tmp_path / "new.csv", [[text] for text in NEW], ["text"])
    return tmp_path


def arguments(checkpoint, data, *more):
    files = [word for name in ("train", "dev") for word in (f"--{name}", str(data / f"{name}.csv"))]
    return [str(checkpoint), *files, "--out", str(data / "out"), *FAST, *more]


def read_tsv(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_classification_learns_and_its_model_works_in_a_pipeline(checkpoint, data, capsys):
    transformers = pytest.importorskip("transformers")
    # Small batches: predictions must come back from the order by length.
    more = ["--test", str(data / "test.csv"), "--predict", str(data / "new.csv"), "--seeds", "2", "--epochs", "4",
            "--micro_batch_size", "1"]  # fmt: skip
    assert main(arguments(checkpoint, data, *more)) == 0
    out = data / "out"
    result = json.loads((out / "result.json").read_text())
    assert [run["seed"] for run in result["runs"]] == [1, 2]
    accuracies = [run["dev"]["accuracy"] for run in result["runs"]]
    assert result["median"] == pytest.approx(np.median(accuracies))
    assert max(accuracies) == 1.0
    best = result["runs"][result["best_seed"] - 1]
    assert best["dev"]["accuracy"] == best["test"]["accuracy"] == max(accuracies)
    # The kernels are used if the trial says that they pay.
    with_kernels, without = (result["speeds"][f"fp32 {how} kernels"] for how in ("with", "without"))
    assert result["kernels"] == (with_kernels > 1.1 * without > 0)

    rows = read_tsv(out / "predictions.tsv")
    assert rows[0] == ["index", "prediction"]
    assert [row[0] for row in rows[1:]] == [str(index) for index in range(len(NEW))]
    classify = transformers.pipeline("text-classification", model=str(out / "model"), device="cpu")
    assert [row[1] for row in rows[1:]] == [one["label"] for one in classify(NEW)]
    for name in ("confusion.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    # Nothing that needs this project is left in the model's directory, and no other seed's model.
    assert "fastroberta" not in (out / "model" / "config.json").read_text()
    assert not list(out.glob("seed-*/*/"))
    printed = capsys.readouterr().out
    assert "epoch 4" in printed
    assert printed.count(" (trial of 2 layers, tokens/s on a core: fp32 with kernels ") == 1  # for both seeds


def test_early_stopping_keeps_the_best_epoch(checkpoint, data):
    assert main(arguments(checkpoint, data, "--epochs", "30", "--patience", "2", "--metric", "f1")) == 0
    result = json.loads((data / "out" / "result.json").read_text())
    run = result["runs"][0]
    assert run["epochs"] == run["best_epoch"] + 2 < 30
    assert result["metric"] == "f1" and result["median"] == run["dev"]["f1"]


def test_the_same_command_continues_after_the_last_finished_seed(checkpoint, data):
    assert main(arguments(checkpoint, data, "--seeds", "2")) == 0
    out = data / "out"
    done = json.loads((out / "seed-1" / "result.json").read_text())
    (out / "seed-1" / "result.json").write_text(json.dumps({**done, "seconds": -1.0}))
    (out / "seed-2" / "result.json").unlink()
    with pytest.raises(ConfigurationError, match=r"out: .* holds a finished run; give another"):
        main(arguments(checkpoint, data, "--seeds", "2"))
    (out / "result.json").unlink()
    with pytest.raises(ConfigurationError, match=r"out: .* holds a run with learning_rate = 0.003; give another"):
        main(arguments(checkpoint, data, "--seeds", "2", "--learning_rate", "1e-3"))
    settings = json.loads((out / "settings.json").read_text())
    chosen = {
        "device": "cpu",
        "precision": "bf16",
        "kernels": True,
        "why": "chance",
        "speeds": {"bf16 with kernels": 7.0},
    }
    (out / "settings.json").write_text(json.dumps(settings | {"chosen": chosen}))
    assert main(arguments(checkpoint, data, "--seeds", "2")) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["runs"][0]["seconds"] == -1.0 and result["runs"][1]["seconds"] > 0
    assert chosen.items() <= result.items()  # as it began, without another trial


def test_bf16_without_kernels(checkpoint, data):
    assert main(arguments(checkpoint, data, "--precision", "bf16", "--kernels", "false", "--epochs", "1")) == 0
    result = json.loads((data / "out" / "result.json").read_text())
    assert (result["precision"], result["kernels"]) == ("bf16", False)
    assert result["speeds"] == {}  # there is nothing to compare


@pytest.mark.parametrize(
    ("precision", "kernels", "settled", "plain", "tried", "chosen", "why"),
    [
        ("auto", "auto", "bf16", 20.0, 4, "bf16 with kernels", "the fastest"),
        ("auto", "auto", "bf16", 28.0, 4, "fp32 without kernels", "nothing else is a tenth faster"),
        ("auto", "true", "bf16", 40.0, 4, "bf16 with kernels", "the fastest"),
        ("auto", "auto", "fp32", 40.0, 2, "fp32 without kernels", "nothing else is a tenth faster"),  # bf16 is emulated
        ("bf16", "auto", "bf16", 40.0, 2, "bf16 with kernels", "the fastest"),
        ("fp32", "true", "fp32", 40.0, 2, "fp32 with kernels", "as asked"),  # but compared
        ("auto", "false", "fp32", 40.0, 0, "fp32 without kernels", "as asked"),
    ],
)
def test_the_fastest_way_that_the_settings_allow(
    checkpoint, data, monkeypatch, precision, kernels, settled, plain, tried, chosen, why
):
    speeds = {"bf16 with kernels": 30.0, "bf16 without kernels": 25.0, "fp32 with kernels": 10.0}
    speeds["fp32 without kernels"] = plain
    monkeypatch.setattr(finetune_speed, "settle_precision", lambda *_: (settled, ""))
    monkeypatch.setattr(finetune_speed, "measure_speeds", lambda ways, *_: {str(way): speeds[str(way)] for way in ways})
    words = arguments(checkpoint, data, "--precision", precision, "--kernels", kernels)
    config = parse_arguments(words, FinetuneConfig, description="")
    train = Examples([{"input_ids": [0, 5, 2], "labels": 1}] * 4, 0)
    device = torch.device("cpu")
    found = finetune_speed.choose_place(config, device, "classification", ["0", "1"], train, make_collate(1))
    assert (str(found[0]), found[1], len(found[2])) == (chosen, why, tried)


def test_several_processes_are_refused(checkpoint, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="finetune runs in one process; start it without torchrun"):
        main(arguments(checkpoint, data))


def test_regression_of_pairs(checkpoint, data):
    rows = [[first, second, len(first) / 10] for first, _ in TEXTS for second, _ in TEXTS]
    for name, suffix in (("train", ""), ("dev", "")):
        write_csv(data / f"{name}{suffix}.csv", rows, ["a", "b", "score"])
    more = ["--kind", "regression", "--text", "a", "--pair", "b", "--label", "score"]
    assert main(arguments(checkpoint, data, *more)) == 0
    run = json.loads((data / "out" / "result.json").read_text())["runs"][0]
    assert set(run["dev"]) == {"pearson", "spearman", "mse"}
    predictions = [float(value) for _, value in read_tsv(data / "out" / "predictions.tsv")[1:]]
    assert np.mean((np.array(predictions) - [row[2] for row in rows]) ** 2) == pytest.approx(
        run["dev"]["mse"], abs=2e-3
    )
    assert (data / "out" / "confusion.png").exists()


@pytest.mark.parametrize(
    ("change", "more", "error", "message"),
    [
        ({}, ["--max_seq_length", "33"], ConfigurationError, "max_seq_length = 33: .* takes 32 at most"),
        ({}, ["--label", "class"], DataError, r"train.csv: no column 'class', it has text, label; name the columns"),
        ({"dev": [["Paris", "thing"]]}, [], DataError, r"dev.csv:2: the training file has no label 'thing', it has person,"),
        ({"dev": [["Paris", ""]]}, [], DataError, "dev.csv:2: no label; fill it in"),
        ({"dev": [["", "place"]]}, [], DataError, "dev.csv:2: text holds no text"),
        ({"dev": [["a", "b", "place"]]}, [], DataError, "dev.csv:2: expected 2 fields, as in the header, found 3; put"),
        ({"dev": []}, [], DataError, "dev.csv: contains no records"),
        ({"train": [["Paris", "place"]]}, [], DataError, "train.csv: every record has the label 'place'"),
        ({}, ["--test", "new.csv"], DataError, "new.csv: no column 'label', it has text; a file that is scored needs"),
        ({}, ["--test", "none.csv"], DataError, "none.csv: cannot be read"),
        ({}, ["--test", "none.txt"], ConfigurationError, r"none.txt: unknown format; its name must end in .csv"),
        ({}, ["--kind", "regression"], DataError, "train.csv:2: label is 'place', and regression needs a number"),
        ({}, ["--kind", "regression", "--class_weights"], ConfigurationError, "class_weights: regression has no"),
        ({}, ["--kind", "regression", "--metric", "f1"], ConfigurationError, "metric = f1: regression has pearson"),
        ({}, ["--micro_batch_size", "5"], ConfigurationError, "micro_batch_size = 5: must divide train_batch_size = 16"),
        ({}, ["--task", "cola"], ConfigurationError, "--task or --train is required, and not both"),
        ({}, ["--precision", "fp16"], ConfigurationError, "precision = fp16: needs a GPU"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_training(checkpoint, data, monkeypatch, change, more, error, message):
    monkeypatch.chdir(data)
    for name, rows in change.items():
        write_csv(data / f"{name}.csv", rows, ["text", "label"])
    with pytest.raises(error, match=message):
        main(arguments(checkpoint, data, *more))
    assert not (data / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--task or --train is required"),
        (["--train", "t.csv"], "--dev is required with --train"),
        (["--task", "cola", "--data", ".", "--label", "x"], "label is for own data"),
        (["--task", "glue", "--data", ".", "--class_weights"], "--task glue takes no metric, class_weights"),
        (["--train", "t.csv", "--dev", "d.csv", "--data", "."], "data is for --task; own data are named by"),
        (["--train", "t.csv", "--dev", "d.csv", "--stride", "9"], "stride = 9: is for question-answering"),
        (["--train", "t", "--dev", "d", "--kind", "tokens", "--pair", "b"], "pair: token classification takes one"),
        (
            ["--train", "t", "--dev", "d", "--kind", "multi-label", "--label_smoothing", "0.1"],
            "label_smoothing = 0.1: not",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ConfigurationError, match=message):
        main(["checkpoint", "--out", "out", *words])


def test_a_checkpoint_without_tokenizer_or_weights_is_refused(checkpoint, data):
    copy = shutil.copytree(checkpoint, data / "copy")
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="copy: cannot be loaded"):
        main(arguments(copy, data))
    for name in ("tokenizer.json", "vocab.json"):
        (copy / name).unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
        main(arguments(copy, data))


def test_a_missing_package_is_named():
    code = (
        "import sys; sys.modules['seqeval'] = None\n"
        "from fastroberta.cli.program import run; from fastroberta.finetune import main\n"
        "sys.exit(run(lambda: main(['./c', '--train', 'a.csv', '--dev', 'b.csv', '--out', 'o'])))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: finetune needs seqeval; pip install 'fastroberta[finetune]'\n"
