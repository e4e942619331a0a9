"""What a model is fine-tuned for: files, columns and a metric, for GLUE's tasks by name or for own data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, DataError

SAVED = "task.json"  # beside a fine-tuned model


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: a key of METRICS.
        text, pair, label: columns; there may be no pair.
        metric: by which the best epoch and the best seed are chosen.
        scored: name -> further file with labels. predicted: name of the output -> file without labels.
        header: columns of the files for training and development, where their first line does not name them.
        of_glue: whether the files are GLUE's: QQP's hold broken lines, which are left out, and empty texts.
    """

    name: str
    kind: str
    text: str
    pair: str | None
    label: str
    metric: str
    train: Path
    dev: Path
    scored: dict[str, Path] = field(default_factory=dict)
    predicted: dict[str, Path] = field(default_factory=dict)
    header: tuple[str, ...] | None = None
    of_glue: bool = False


# Metrics of each kind, the first being the default. F1 is that of the second of two classes, the mean over more classes,
# and micro-averaged for several labels.
METRICS = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "multi-label": ("f1", "accuracy"),
    "tokens": ("f1", "accuracy"),
    "question-answering": ("f1", "exact"),
    "multiple-choice": ("accuracy",),
}
# Columns of own data for the text, its pair and the label, where they are not text, none and label.
COLUMNS: dict[str, tuple[str, str | None, str]] = {
    "tokens": ("words", None, "tags"),
    "question-answering": ("context", "question", "answers"),
    "multiple-choice": ("text", "question", "label"),
}

# Folder in GLUE's archive -> kind, text, pair, label, metric of the RoBERTa paper (appendix; Table 5).
GLUE = {
    "CoLA": ("classification", "sentence", None, "label", "matthews"),
    "SST-2": ("classification", "sentence", None, "label", "accuracy"),
    "MRPC": ("classification", "#1 String", "#2 String", "Quality", "accuracy"),
    "STS-B": ("regression", "sentence1", "sentence2", "score", "pearson"),
    "QQP": ("classification", "question1", "question2", "is_duplicate", "accuracy"),
    "MNLI": ("classification", "sentence1", "sentence2", "gold_label", "accuracy"),
    "QNLI": ("classification", "question", "sentence", "label", "accuracy"),
    "RTE": ("classification", "sentence1", "sentence2", "label", "accuracy"),
    "WNLI": ("classification", "sentence1", "sentence2", "label", "accuracy"),
}


def find_task(name: str, data: Path) -> Task:
    """A task by its name in lower case: `squad`, `squad2`, `race`, or one of GLUE.

    Raises:
        DataError: `data` does not hold its files.
    """
    if name == "race":
        needed = data / "train", data / "dev"
        tests = {"test": "test", "test-middle": "test/middle", "test-high": "test/high"}
        scored = {part: data / folder for part, folder in tests.items() if (data / folder).is_dir()}
        kind, metric = "multiple-choice", "accuracy"
    elif name in ("squad", "squad2"):
        version = "v1.1" if name == "squad" else "v2.0"
        needed = data / f"train-{version}.json", data / f"dev-{version}.json"
        kind, metric, scored = "question-answering", "f1", {}
    else:
        return find_glue_task(next(one for one in GLUE if one.lower() == name), data)
    for path in needed:
        if not path.exists():
            raise DataError(f"{path}: no such file; --data takes the directory of {name}")
    text, pair, label = COLUMNS[kind]
    return Task(name, kind, text, pair, label, metric, *needed, scored=scored)


def find_glue_task(name: str, data: Path) -> Task:
    """A task of GLUE whose files lie in `data`, or in the folder of its name there.

    Raises:
        DataError: there is no train.tsv, or no file for development.
    """
    folder = data / name if (data / name).is_dir() else data
    kind, text, pair, label, metric = GLUE[name]
    parts = ("matched", "mismatched") if name == "MNLI" else ("",)
    dev, *scored = (folder / f"dev{part and '_' + part}.tsv" for part in parts)
    for path in (folder / "train.tsv", dev, *scored):
        if not path.is_file():
            raise DataError(f"{path}: no such file; --data takes GLUE's directory, or the folder of {name} in it")
    tests = {
        "predictions-mismatched" if part == "mismatched" else "predictions": folder / f"test{part and '_' + part}.tsv"
        for part in parts
    }
    return Task(
        name, kind, text, pair, label, metric, folder / "train.tsv", dev,
        scored=dict(zip(["dev-mismatched"], scored)),
        predicted={stem: path for stem, path in tests.items() if path.is_file()},
        header=("source", "label", "original_label", "sentence") if name == "CoLA" else None,
        of_glue=True,
    )  # fmt: skip


def list_columns(task: Task, *, with_label: bool) -> Sequence[str]:
    """The columns that a file of the task needs."""
    return [task.text, *filter(None, [task.pair]), *[task.label] * with_label]


@dataclass(frozen=True)
class SavedTask:
    """How the data of a fine-tuned model were read, which is how its held-out data are read again.

    Attributes:
        no_answer_threshold: see `questions`. The others are as in `Task` and in the settings of fine-tuning.
    """

    kind: str
    text: str
    pair: str | None
    label: str
    metric: str
    header: list[str] | None = None
    of_glue: bool = False
    max_length: int | None = None
    stride: int | None = None
    no_answer_threshold: float | None = None

    def of_file(self, path: Path) -> Task:
        """The task with a file of its own."""
        return Task(
            path.stem, self.kind, self.text, self.pair, self.label, self.metric, path, path,
            header=tuple(self.header) if self.header else None, of_glue=self.of_glue,
        )  # fmt: skip


def save_task(
    task: Task, directory: Path, max_length: int, stride: int | None, no_answer_threshold: float | None
) -> None:
    """Write `task.json` beside a model."""
    kept = {name: getattr(task, name) for name in ("kind", "text", "pair", "label", "metric", "header", "of_glue")}
    saved = SavedTask(**kept, max_length=max_length, stride=stride, no_answer_threshold=no_answer_threshold)
    (directory / SAVED).write_text(json.dumps(dataclasses.asdict(saved), indent=2) + "\n", encoding="utf-8")


def load_task(directory: Path) -> SavedTask | None:
    """What `save_task` wrote beside a model; None if nothing.

    Raises:
        CheckpointError: it is damaged.
    """
    path = directory / SAVED
    if not path.exists():
        return None
    try:
        return SavedTask(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be used ({error}); remove it") from error
