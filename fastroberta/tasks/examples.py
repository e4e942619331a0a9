"""Records as a model takes them: token ids cut to its length, labels as numbers, batches padded to their longest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import DataError
from .tables import Table
from .task import Task, list_columns

IGNORED_LABEL = -100
HINT = "name the columns with --text, --pair and --label"


@dataclass(frozen=True)
class Question:
    """A question on a text; `answers` are all that count as right, none for a question without an answer."""

    id: str
    context: str
    answers: list[str]


@dataclass(frozen=True)
class Examples:
    """The examples of one file.

    Attributes:
        features: `input_ids` (list of int) and, where there are labels, `labels`: an int, a float, a list of floats
            (several labels) or a list of ints (tokens; IGNORED_LABEL where a token begins no word). For tokens, also
            `words`, the number of the word that each token begins, or None, and `num_words`.
        num_truncated: examples longer than the model takes.
        questions: of question answering only; see `encode_questions` for its features.
    """

    features: list[dict[str, Any]]
    num_truncated: int
    questions: list[Question] = field(default_factory=list)


def count_tokens(feature: dict[str, Any]) -> int:
    """Length of an example, of its longest choice if it has several."""
    ids = feature["input_ids"]
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def list_labels(table: Table, task: Task) -> list[str]:
    """The labels that occur in the training file, in numerical order if all are whole numbers.

    Regression, questions and choices have none.

    Raises:
        DataError: a column or a label is missing, or all records have the same label.
    """
    table.require(list_columns(task, with_label=True), HINT)
    if task.kind in ("regression", "question-answering", "multiple-choice"):
        return []
    found: Counter[str] = Counter()
    for index, record in enumerate(table.records):
        found.update(_read_labels(record[task.label], task.kind, table.place(index)))
    if len(found) < 2 and task.kind != "multi-label":
        raise DataError(f"{table.path}: every record has the label {next(iter(found))!r}; there is nothing to learn")
    if all(label.lstrip("-").isdigit() for label in found):
        return sorted(found, key=int)
    return sorted(found)


def encode_table(
    table: Table, task: Task, tokenizer: Tokenizer, labels: Sequence[str], max_length: int, *, with_label: bool = True
) -> Examples:
    """The examples of a file.

    Args:
        labels: of the training file, whose places are the classes' numbers. max_length: tokens of a sequence, `<s>` and
            `</s>` included; of a pair, the longer text is cut.
        with_label: whether the file must have labels.
    Raises:
        DataError: a column is missing, or a record has no text, or a label that the training file does not have.
    """
    table.require(list_columns(task, with_label=False), HINT)
    if with_label:
        table.require([task.label], "a file that is scored needs labels; --predict takes one without")
    texts = [_read_text(record, task, table.place(index)) for index, record in enumerate(table.records)]
    tokenizer.enable_truncation(max_length)
    is_words = task.kind == "tokens"
    encodings = tokenizer.encode_batch(texts, is_pretokenized=is_words)
    number_of = {label: number for number, label in enumerate(labels)}
    features = []
    for index, (record, encoding) in enumerate(zip(table.records, encodings)):
        feature: dict[str, Any] = {"input_ids": encoding.ids}
        if is_words:
            feature |= {"words": _first_tokens(encoding.word_ids), "num_words": len(texts[index])}
        if with_label:
            place = table.place(index)
            value = _read_value(record[task.label], task, number_of, place)
            if is_words:
                if len(value) != len(texts[index]):
                    raise DataError(f"{place}: {len(texts[index])} words and {len(value)} tags; give each word one tag")
                value = [IGNORED_LABEL if word is None else value[word] for word in feature["words"]]
            feature["labels"] = value
        features.append(feature)
    return Examples(features, sum(bool(encoding.overflowing) for encoding in encodings))


def make_collate(pad_token_id: int, device_multiple: int = 1) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A function from features to a batch: `input_ids` and `attention_mask` (b, l) int64, (b, choices, l) for multiple
    choice, and `labels`, (b,) int64 or fp32, (b, number of labels) fp32, (b, l) int64, or (b, 2) int64 for spans."""

    def pad(rows: list[list[int]], value: int) -> Tensor:
        length = -(-max(map(len, rows)) // device_multiple) * device_multiple
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [feature["input_ids"] for feature in features]
        shape: tuple[int, ...] = (len(ids), -1)
        if isinstance(ids[0][0], list):
            shape = (len(ids), len(ids[0]), -1)
            ids = [row for choices in ids for row in choices]
        batch = {"input_ids": pad(ids, pad_token_id), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
        batch = {name: tensor.view(shape) for name, tensor in batch.items()}
        if "labels" in features[0]:
            values = [feature["labels"] for feature in features]
            batch["labels"] = pad(values, IGNORED_LABEL) if "words" in features[0] else torch.tensor(values)
        return batch

    return collate


def _first_tokens(word_ids: list[int | None]) -> list[int | None]:
    """For each token the number of the word that it begins, or None."""
    return [word if word != before else None for word, before in zip(word_ids, [None, *word_ids])]


def _read_text(record: dict[str, Any], task: Task, place: str) -> Any:
    values = [record[column] for column in (task.text, task.pair) if column is not None]
    if task.kind == "tokens":
        words = values[0]
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise DataError(f'{place}: {task.text} is no list of words; give ["word", ...] or a .conll file')
        return [f" {word}" if index else word for index, word in enumerate(words)]  # as in running text
    for column, value in zip((task.text, task.pair), values):
        if not isinstance(value, str) or not (value.strip() or task.of_glue):
            raise DataError(f"{place}: {column} holds no text; fill it in, or remove the record")
    return tuple(values) if task.pair else values[0]


def _read_labels(value: Any, kind: str, place: str) -> list[str]:
    """The labels of a record as text: one, one per word, or any number of them."""
    if kind == "multi-label" and not isinstance(value, list):
        value = [part.strip() for part in str("" if value is None else value).split(",") if part.strip()]
    values = value if isinstance(value, list) and kind != "classification" else [value]
    values = [int(one) if isinstance(one, float) and one.is_integer() else one for one in values]  # pandas writes 1.0
    found = [str(one).strip() if isinstance(one, str | int) else "" for one in values]
    if not all(found):
        raise DataError(f"{place}: no label; fill it in, or remove the record")
    return found


def _read_value(value: Any, task: Task, number_of: dict[str, int], place: str) -> Any:
    if task.kind == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{place}: {task.label} is {value!r}, and regression needs a number; fix the record")
        return number
    found = _read_labels(value, task.kind, place)
    for label in found:
        if label not in number_of:
            known = ", ".join(list(number_of)[:10]) + ", ..." * (len(number_of) > 10)
            raise DataError(f"{place}: the training file has no label {label!r}, it has {known}; fix one of the two")
    if task.kind == "multi-label":
        return [float(label in found) for label in number_of]
    return [number_of[label] for label in found] if task.kind == "tokens" else number_of[found[0]]
