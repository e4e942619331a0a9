"""Texts from the command line, from files, or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError, DataError
from .tables import read_table

TEXT_COLUMNS = (("sentence",), ("text",), ("sentence1", "sentence2"))


def read_texts(texts: Sequence[str], file: str | None) -> list[str]:
    """The given texts and the lines of a file; without either, the lines of standard input. Blank lines are left out, and
    a line on stderr says how many.

    Raises:
        DataError: the file cannot be read. ConfigurationError: there is no text.
    """
    found = list(texts)
    if file is not None and file != "-":
        try:
            found += _split_lines(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise DataError(f"{file}: cannot be read ({reason}); give a text file with one text per line") from error
    elif file == "-" or not found:
        found += _split_lines(sys.stdin.read())
    kept = [text for text in found if text.strip()]
    if not kept:
        raise ConfigurationError("texts: there are none; give a text, --file FILE, or text on standard input")
    if blank := len(found) - len(kept):  # line n is then not text n
        print(f"{blank:,} blank lines are left out", file=sys.stderr)
    return kept


def _split_lines(text: str) -> list[str]:
    # Not splitlines(): a text may hold a form feed or a Unicode line separator.
    return text.removesuffix("\n").split("\n")


def read_labelled_texts(file: str) -> tuple[list[str | tuple[str, str]], list[str]]:
    """Texts, or pairs of texts, and their labels, from a table whose first line names its columns.

    The columns are `label`, and either `sentence`, `text`, or `sentence1` and `sentence2`.

    Raises:
        DataError: the file cannot be read or lacks a column. See `read_table`.
    """
    table = read_table(Path(file))
    names = table.records[0].keys()
    columns = next((choice for choice in TEXT_COLUMNS if names >= {"label", *choice}), None)
    if columns is None:
        raise DataError(
            f"{file}: its columns are {', '.join(names)}; name them sentence and label, or sentence1, sentence2 and label"
        )
    texts = [tuple(record[column] for column in columns) for record in table.records]
    return [text if len(text) > 1 else text[0] for text in texts], [record["label"] for record in table.records]
