"""The parts of fine-tuning: files, GLUE's columns, the loss, metrics, and the training held against a plain loop."""

import ast
import csv
import json
import re
import shutil
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
from plain_finetuning import train_here, train_plainly

from fastroberta.cli.arguments import parse_arguments
from fastroberta.corpus.tokenizer import load_tokenizer
from fastroberta.errors import DataError
from fastroberta.finetune import main
from fastroberta.tasks.examples import encode_table, list_labels, make_collate
from fastroberta.tasks.finetune_loss import make_loss, weigh_classes
from fastroberta.tasks.finetune_settings import FinetuneConfig
from fastroberta.tasks.metrics import score_predictions
from fastroberta.tasks.tables import read_table
from fastroberta.tasks.task import GLUE, Task, find_glue_task

ROOT = Path(__file__).parents[2]
# The header of each file in GLUE's archive, and a record; CoLA's first file has none.
GLUE_FILES = {
    "CoLA": ("", "gj04\t0\t*\tThe \"book thanks.\n", "index\tsentence\n", "0\tParis thanks.\n"),
    "SST-2": ("sentence\tlabel\n", "a \"charming journey\t1\n", "index\tsentence\n", "0\tbleak\n"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "1\t12\t13\tAnna \"gives.\tBen takes.\n",
             "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "0\t1\t2\tAnna.\tBen.\n"),
    "STS-B": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
              "0\tnews\tf\t2012\t1\tnone\tnone\tA \"plane.\tAn air plane.\t4.250\n",
              "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\n",
              "0\tnews\tf\t2012\t1\tnone\tnone\tA plane.\tA book.\n"),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n", "5\t1\t2\tWhy \"Paris?\t\t0\n",
            "id\tquestion1\tquestion2\n", "0\tWho?\tWhat?\n"),
    "MNLI": ("index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n", "0\tf\tA \"book.\tBen.\tneutral\tneutral\n",
             "index\tgenre\tsentence1\tsentence2\n", "0\tf\tA book.\tBen.\n"),
    "QNLI": ("index\tquestion\tsentence\tlabel\n", "0\tWho \"is?\tAnna.\tnot_entailment\n",
             "index\tquestion\tsentence\n", "0\tWho?\tBen.\n"),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n", "0\tA \"book.\tBen.\tentailment\n",
            "index\tsentence1\tsentence2\n", "0\tBen.\tAnna.\n"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel\n", "0\tA \"book.\tBen.\t1\n",
             "index\tsentence1\tsentence2\n", "0\tBen.\tAnna.\n"),
}  # fmt: skip
OTHER_LABEL = {"1": "0", "0": "1", "neutral": "contradiction", "entailment": "not_entailment",
               "not_entailment": "entailment", "4.250": "1.000"}  # fmt: skip


def write_glue(folder, name):
    folder.mkdir()
    header, record, test_header, test_record = GLUE_FILES[name]
    label = re.search(r"(?<=\t)(0|1|4.250|neutral|\w*entailment)(?=\n)", record)
    position = label.start() if label else record.index("\t0\t" if name == "CoLA" else "1\t") + (name == "CoLA")
    old = label.group() if label else record[position]
    other = record[:position] + OTHER_LABEL[old] + record[position + len(old) :]
    (folder / "train.tsv").write_text(header + record + other)
    for part in ("_matched", "_mismatched") if name == "MNLI" else ("",):
        (folder / f"dev{part}.tsv").write_text(header + other)
        (folder / f"test{part}.tsv").write_text(test_header + test_record)


@pytest.mark.parametrize("name", GLUE)
def test_tasks_of_glue_are_read_from_their_own_files(checkpoint, tmp_path, name):
    write_glue(tmp_path / name, name)
    task = find_glue_task(name, tmp_path)
    assert find_glue_task(name, tmp_path / name) == task
    train, dev = (read_table(path, task.header, task.of_glue) for path in (task.train, task.dev))
    assert '"' in train.records[0][task.text]  # quotes are characters
    labels = list_labels(train, task)
    assert len(labels) == (0 if name == "STS-B" else 2)
    tokenizer = load_tokenizer(checkpoint)
    first, second = (feature["labels"] for feature in encode_table(train, task, tokenizer, labels, 32).features)
    assert {first, second} == ({4.25, 1.0} if name == "STS-B" else {0, 1})
    assert encode_table(dev, task, tokenizer, labels, 32).features[0]["labels"] == second
    for path in (*task.scored.values(), *task.predicted.values()):
        encode_table(read_table(path), task, tokenizer, labels, 32, with_label=False)
    parts = 2 if name == "MNLI" else 1
    assert (len(task.scored), len(task.predicted)) == (parts - 1, parts)


def test_all_of_glue_in_a_table(checkpoint, tmp_path, capsys, monkeypatch):
    glue, out = tmp_path / "glue", tmp_path / "out"
    glue.mkdir()
    arguments = [str(checkpoint), "--task", "glue", "--data", str(glue), "--out", str(out), "--epochs", "1",
                 "--precision", "fp32", "--device", "cpu", "--kernels", "false"]  # fmt: skip
    for name in GLUE:
        if name != "WNLI":
            write_glue(glue / name, name)
    with pytest.raises(DataError, match=r"no such file; .* the folder of WNLI"):
        main(arguments)
    assert not out.exists()  # nothing was trained
    write_glue(glue / "WNLI", "WNLI")
    assert main(arguments) == 0
    table = (out / "glue.md").read_text()
    assert table in capsys.readouterr().out
    results = {name: json.loads((out / name / "result.json").read_text()) for name in GLUE}
    rows = {row[0]: row for row in (line.strip("| ").split(" | ") for line in table.splitlines()[2:])}
    assert set(rows) == set(GLUE)
    assert rows["QNLI"] == ["QNLI", "accuracy", f"{100 * results['QNLI']['median']:.1f}", "92.3", "92.8", "94.7"]
    assert rows["MNLI"][2].count("/") == 1
    # The paper starts three small tasks from its model for MNLI, whose head has another size.
    assert {name for name, one in results.items() if one["checkpoint"].endswith("MNLI/model")} == {
        "RTE",
        "STS-B",
        "MRPC",
    }
    assert (out / "MNLI" / "predictions-mismatched.tsv").read_text().startswith("index\tprediction\n0\t")
    # A table that is missing is made from what is there, without training.
    (out / "glue.md").unlink()
    monkeypatch.setattr("fastroberta.tasks.glue_suite.finetune", None)
    assert main(arguments) == 0
    assert (out / "glue.md").read_text() == table


def test_broken_lines_of_glue_are_counted_and_of_own_data_refused(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\r\nParis\u2028France\t1\r\nAnna\r\n\r\nBen\t0\r\n")
    table = read_table(path, skip_broken=True)
    assert [record["label"] for record in table.records] == ["1", "0"]
    assert (table.num_skipped, table.place(1)) == (1, f"{path}:5")
    with pytest.raises(DataError, match=r"train.tsv:3: expected 2 fields, as in the header, found 1"):
        read_table(path)
    with pytest.raises(DataError, match=r"train.tsv: no such file; --data takes GLUE's directory"):
        find_glue_task("RTE", tmp_path / "nowhere")


def test_formats_give_the_same_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"text": 'Anna, "Ben"', "label": "a"}, {"text": "Paris", "label": "b"}]
    (tmp_path / "d.csv").write_text('text,label\n"Anna, ""Ben""",a\nParis,b\n')
    (tmp_path / "d.tsv").write_text('text\tlabel\nAnna, "Ben"\ta\nParis\tb\n')
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        assert read_table(tmp_path / f"d.{suffix}").records == records
    (tmp_path / "d.jsonl").write_text('\ufeff{"text": "a"}\n', encoding="utf-8")
    assert read_table(tmp_path / "d.jsonl").records == [{"text": "a"}]
    (tmp_path / "d.tsv").write_bytes(b"text\tlabel\r\nAnna\rBen\ta\r\n")  # the second line holds a carriage return
    assert read_table(tmp_path / "d.tsv").records == [{"text": "Anna\rBen", "label": "a"}]
    (tmp_path / "d.csv").write_text(f"text,label\n{'a' * 200_000},b\n")  # longer than Python's own limit
    csv.field_size_limit(1 << 17)
    assert len(read_table(tmp_path / "d.csv").records[0]["text"]) == 200_000
    (tmp_path / "d.jsonl").write_text('{"text": 1}\n{]\n')
    with pytest.raises(DataError, match=r"d.jsonl:2: not JSON"):
        read_table(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": 1.0}\n{"text": "b"}\n')
    task = Task("made", "classification", "text", None, "label", "f1", tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"d.jsonl:2: no column 'label', it has text"):
        list_labels(read_table(tmp_path / "d.jsonl"), task)
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": 1.0}\n{"text": "b", "label": 0}\n')
    assert list_labels(read_table(tmp_path / "d.jsonl"), task) == ["0", "1"]


def test_batches_are_padded_to_their_longest():
    collate = make_collate(1)
    batch = collate([{"input_ids": [0, 5, 2], "labels": 1}, {"input_ids": [0, 5, 6, 7, 2], "labels": 0}])
    assert batch["input_ids"].tolist() == [[0, 5, 2, 1, 1], [0, 5, 6, 7, 2]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5]
    assert batch["labels"].tolist() == [1, 0]
    assert make_collate(1, 8)([{"input_ids": [0, 2]}])["input_ids"].shape == (1, 8)


def test_scores_are_those_worked_out_by_hand():
    expected = np.array([0, 0, 1, 1, 1])
    logits = np.eye(2)[[0, 1, 1, 1, 0]]  # one false positive, one false negative
    scores = score_predictions("classification", logits, expected, ["0", "1"])
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["precision"] == scores["recall"] == scores["f1"] == pytest.approx(2 / 3)
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / 6)
    assert score_predictions("classification", np.eye(2)[[0] * 5], expected, ["0", "1"])["matthews"] == 0.0
    scores = score_predictions("regression", np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]), [])
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(3 / (2 * 14 / 3) ** 0.5)
    assert scores["mse"] == pytest.approx(1 / 3)


@pytest.fixture(scope="session")
def without_dropout(checkpoint, tmp_path_factory):
    directory = shutil.copytree(checkpoint, tmp_path_factory.mktemp("plain") / "checkpoint")
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def settle(checkpoint, directory, *more):
    """Settings for 50 steps of 8 on made-up sentences of several lengths."""
    generator = np.random.default_rng(1)
    words = np.array(["Paris", "Anna", "Ben", "book", "thanks", "the"])
    rows = [" ".join(generator.choice(words, generator.integers(1, 12))) for _ in range(400)]
    (directory / "train.csv").write_text("text,label\n" + "".join(f"{row},{int('Anna' in row)}\n" for row in rows))
    files = [word for name in ("train", "dev") for word in (f"--{name}", str(directory / "train.csv"))]
    arguments = [str(checkpoint), *files, "--out", str(directory / "out"), "--train_batch_size", "8", "--epochs", "1",
                 "--learning_rate", "1e-3", *more]  # fmt: skip
    return parse_arguments(arguments, FinetuneConfig, description="")


def test_losses_are_those_of_a_plain_loop(without_dropout, tmp_path):
    config = settle(without_dropout, tmp_path)
    ours, _, batches, _, data = train_here(config, 400, tmp_path)
    theirs, _ = train_plainly(config, batches, data)
    assert len(ours) == 50
    assert max(abs(loss - ours[0]) for loss in ours) > 0.05  # it learns, so that the comparison says something
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_accumulated_micro_batches_equal_the_whole_batch(without_dropout, tmp_path, kind):
    losses, weights = [], []
    for micro in ("8", "1"):
        config = settle(without_dropout, tmp_path, "--micro_batch_size", micro, "--kind", kind)
        found, _, batches, model, _ = train_here(config, 20, tmp_path)  # the last batch is half a one
        assert max(len(batch["input_ids"]) for batch in batches) == int(micro)
        losses.append(found)
        weights.append(model.state_dict())
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)  # AdamW alone would hide a factor
    for name, tensor in weights[0].items():
        if "key.bias" not in name:  # softmax ignores it: its gradient is rounding, which Adam magnifies
            torch.testing.assert_close(tensor, weights[1][name], atol=2e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def train_briefly(without_dropout, tmp_path_factory):
    """A function: settings -> the weights of the head after three steps."""

    def train(*more):
        directory = tmp_path_factory.mktemp("brief")
        _, _, _, model, _ = train_here(settle(without_dropout, directory, *more), 20, directory)
        return model.classifier.dense.weight

    return train


@pytest.fixture(scope="module")
def usual_weights(train_briefly):
    return train_briefly()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", "1"), ("seed", "2"), ("learning_rate", "2e-3"), ("weight_decay", "0.9"), ("warmup", "0.9"),
        ("epochs", "2"), ("train_batch_size", "4"), ("max_seq_length", "8"), ("class_weights", "true"),
        ("label_smoothing", "0.3"),
    ],
)  # fmt: skip
def test_an_option_changes_what_is_learned(train_briefly, usual_weights, option, value):
    is_default = (option, value) == ("seed", "1")
    assert torch.equal(train_briefly(f"--{option}", value), usual_weights) == is_default


def test_class_weights_and_label_smoothing():
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 0, 0, 2])
    weights = weigh_classes("classification", labels.tolist(), 3)
    assert weights.tolist() == pytest.approx([4 / 9, 0, 4 / 3])
    assert weights[labels].mean() == pytest.approx(2 / 3)  # one where every class has examples
    outputs = type("Outputs", (), {"logits": logits})
    log_probs = logits.log_softmax(dim=-1)
    targets = 0.7 * torch.eye(3)[labels] + 0.1
    expected = -(targets * weights * log_probs).sum() / 4
    torch.testing.assert_close(make_loss("classification", weights, 0.3)(outputs, labels), expected)
    half = make_loss("classification", None, 0.0)(outputs, labels, num_items_in_batch=8)
    torch.testing.assert_close(half, -log_probs[range(4), labels].sum() / 8)


def test_every_import_comes_with_the_extra():
    """What `pip install 'fastroberta[finetune]'` installs is what the program imports."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["finetune"], *extras["data"], *extras["hf"], *extras["plot"]]
    allowed = {re.split(r"[^\w-]", one)[0].lower() for one in listed}
    distributions = packages_distributions()
    others = {"onnx_export", "onnx_heldout", "explanation", "explanation_page"}  # of other extras
    modules = [path for path in (ROOT / "fastroberta" / "tasks").glob("*.py") if path.stem not in others]
    files = [ROOT / "fastroberta" / "finetune.py", *modules]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for root in {name.split(".")[0] for name in names}:
                if root in distributions and not root.startswith("fastroberta"):
                    assert {one.lower() for one in distributions[root]} & allowed, f"{path.name} imports {root}"
    assert {"accelerate", "seqeval", "scikit-learn", "transformers"} <= allowed
