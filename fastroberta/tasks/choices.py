"""Multiple choice: which of several answers follows from a text and a question, as in RACE."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from ..errors import DataError
from .examples import HINT, Examples
from .tables import Table
from .task import Task, list_columns

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICES = "choices"


def encode_choices(
    table: Table, task: Task, tokenizer: Tokenizer, max_length: int, *, with_label: bool = True
) -> Examples:
    """Each choice as a pair of the text, and the question with the choice: `input_ids` is a list with a list for each.

    A question's blank `_` is filled with the choice; other questions are followed by it. All records have the same number
    of choices. Labels are letters, or numbers from 0.

    Raises:
        DataError: a column is missing, or a record has too few choices, or a label that names none.
    """
    table.require([*list_columns(task, with_label=False), CHOICES], HINT)
    if with_label:
        table.require([task.label], "a file that is scored needs labels; --predict takes one without")
    tokenizer.enable_truncation(max_length)
    count = len(table.records[0][CHOICES] or [])
    pairs: list[tuple[str, str]] = []
    for index, record in enumerate(table.records):
        choices, text, question = record[CHOICES], record[task.text], record[task.pair] if task.pair else ""
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            raise DataError(f"{table.place(index)}: {CHOICES} is no list of two texts or more; fix the record")
        if len(choices) != count:
            raise DataError(
                f"{table.place(index)}: {len(choices)} choices, the first record has {count}; fix the record"
            )
        if not isinstance(text, str) or not isinstance(question, str) or not text.strip():
            raise DataError(f"{table.place(index)}: {task.text} or {task.pair} holds no text; fill it in")
        for choice in choices:
            ending = question.replace("_", choice) if "_" in question else f"{question} {choice}".strip()
            pairs.append((text, ending))
    encodings = tokenizer.encode_batch(pairs)
    features = []
    for index, record in enumerate(table.records):
        of_record = encodings[index * count : (index + 1) * count]
        feature: dict[str, Any] = {"input_ids": [encoding.ids for encoding in of_record]}
        if with_label:
            feature["labels"] = _read_choice(record[task.label], count, table.place(index))
        features.append(feature)
    num_truncated = sum(
        any(encoding.overflowing for encoding in encodings[start : start + count])
        for start in range(0, len(encodings), count)
    )
    return Examples(features, num_truncated)


def _read_choice(value: Any, count: int, place: str) -> int:
    names = {letter: number for number, letter in enumerate(LETTERS[:count])} | {str(n): n for n in range(count)}
    if str(value).strip() not in names:
        raise DataError(
            f"{place}: label {value!r} names none of the {count} choices; give a letter from A, or a number from 0"
        )
    return names[str(value).strip()]
