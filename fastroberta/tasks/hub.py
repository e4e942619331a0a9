"""Tasks by name from the Hugging Face hub, written down as their own files, which is what everything else reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError
from .task import GLUE

# Splits of GLUE on the hub -> files of GLUE's archive.
SPLITS = {
    "train": "train", "validation": "dev", "test": "test",
    "validation_matched": "dev_matched", "validation_mismatched": "dev_mismatched",
    "test_matched": "test_matched", "test_mismatched": "test_mismatched",
}  # fmt: skip
# Columns of texts in GLUE's archive -> those on the hub, where they differ. The label is always `label` there.
COLUMNS = {
    "MRPC": {"#1 String": "sentence1", "#2 String": "sentence2"},
    "MNLI": {"sentence1": "premise", "sentence2": "hypothesis"},
}
NAMED_LABELS = ("MNLI", "QNLI", "RTE")  # the archive has the names of their classes, of the others the numbers


def download_task(name: str, directory: Path) -> None:
    """Write the files of a task, or of all of GLUE for `glue`, into a directory; those already there are kept.

    Raises:
        ConfigurationError: the package datasets is missing.
        DataError: the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"--task {name} without --data reads the hub and needs datasets; pip install 'fastroberta[finetune]'"
        ) from error

    def load(*path: str) -> Mapping[str, Any]:
        try:
            return datasets.load_dataset(*path)
        except Exception as error:  # of the network, the disk or the hub: its own kinds are many
            raise DataError(
                f"{'/'.join(path)}: the Hugging Face hub gave no data ({' '.join(str(error).split())}); "
                "give the task's own files by --data"
            ) from error

    wanted = [task for task in GLUE if name in (task.lower(), "glue")]
    for task in wanted:
        _write_once(directory / task, load("nyu-mll/glue", task.lower().replace("-", "")), _write_glue, task)
    if name in ("squad", "squad2"):
        version = "v1.1" if name == "squad" else "v2.0"
        _write_once(directory, load("rajpurkar/squad" + "_v2" * (name == "squad2")), _write_squad, version)
    elif name == "race":
        _write_once(directory, load("ehovy/race", "all"), _write_race)


def _write_once(folder: Path, splits: Mapping[str, Any], write: Callable[..., None], *arguments: str) -> None:
    """Write into a folder that has its name only when it is complete."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    write(partial, splits, *arguments)
    partial.rename(folder)


def _write_glue(folder: Path, splits: Mapping[str, Any], task: str) -> None:
    _, text, pair, label, _ = GLUE[task]
    columns = [text, *filter(None, [pair])]
    for split, records in splits.items():
        is_test = split.startswith("test")
        names = records.features["label"].names if task in NAMED_LABELS else None
        header = ["index", *columns, *[label] * (not is_test)]
        lines = [] if task == "CoLA" and not is_test else [header]
        for index, record in enumerate(records):
            # A field of the archive's files holds no tab and no end of line.
            fields = [" ".join(record[COLUMNS.get(task, {}).get(column, column)].split()) for column in columns]
            value = str(names[record["label"]] if names and not is_test else record["label"])
            if task == "CoLA" and not is_test:
                lines.append(["hub", value, "", *fields])
            else:
                lines.append([str(index), *fields, *[value] * (not is_test)])
        text_of_file = "".join("\t".join(fields) + "\n" for fields in lines)
        (folder / f"{SPLITS[split]}.tsv").write_text(text_of_file, encoding="utf-8")


def _write_squad(folder: Path, splits: Mapping[str, Any], version: str) -> None:
    for split, name in (("train", "train"), ("validation", "dev")):
        paragraphs = [
            {
                "context": record["context"],
                "qas": [
                    {
                        "id": record["id"],
                        "question": record["question"],
                        "is_impossible": not record["answers"]["text"],
                        "answers": [
                            {"text": answer, "answer_start": start}
                            for answer, start in zip(record["answers"]["text"], record["answers"]["answer_start"])
                        ],
                    }
                ],
            }
            for record in splits[split]
        ]
        content = {"version": version, "data": [{"title": "", "paragraphs": paragraphs}]}
        (folder / f"{name}-{version}.json").write_text(json.dumps(content), encoding="utf-8")


def _write_race(folder: Path, splits: Mapping[str, Any]) -> None:
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        (folder / name).mkdir(exist_ok=True)
        for index, record in enumerate(splits[split]):
            passage = {
                "id": f"{record['example_id']}-{index}",
                "article": record["article"],
                "questions": [record["question"]],
                "options": [record["options"]],
                "answers": [record["answer"]],
            }
            (folder / name / f"{index:06d}.txt").write_text(json.dumps(passage), encoding="utf-8")
