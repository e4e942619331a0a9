"""A table of any kind of task as examples."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from .choices import encode_choices
from .examples import Examples, encode_table
from .questions import encode_questions
from .tables import Table
from .task import Task


def encode_examples(
    table: Table,
    task: Task,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    max_length: int,
    stride: int | None,
    *,
    with_label: bool = True,
) -> Examples:
    """The examples of a file; see `encode_table`, `encode_questions` and `encode_choices`, also for what they raise.

    Args:
        labels: of the training file; without meaning for questions and choices. stride: of questions only.
    """
    if task.kind == "multiple-choice":
        return encode_choices(table, task, tokenizer, max_length, with_label=with_label)
    if task.kind == "question-answering":
        return encode_questions(table, task, tokenizer, max_length, stride, with_label=with_label)
    return encode_table(table, task, tokenizer, labels, max_length, with_label=with_label)
