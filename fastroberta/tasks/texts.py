"""Texts that a user gives on the command line, in files, or on standard input."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError, DataError


def read_texts(texts: Sequence[str], file: str | None) -> list[str]:
    """The texts themselves, and the lines of a file; without either, the lines of standard input. Blank lines go.

    Raises:
        DataError: the file cannot be read. ConfigurationError: there is no text at all.
    """
    found = list(texts)
    if file is not None and file != "-":
        try:
            found += Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise DataError(f"{file}: cannot be read ({reason}); give a text file with one text per line") from error
    elif file == "-" or not found:
        found += sys.stdin.read().splitlines()
    found = [text for text in found if text.strip()]
    if not found:
        raise ConfigurationError("texts: there are none; give a text, --file FILE, or text on standard input")
    return found


def read_labelled_texts(file: str) -> tuple[list[str | tuple[str, str]], list[str]]:
    """Texts, or pairs of texts, and their labels, from a .tsv file whose first line names its columns.

    The columns are `label`, and `sentence` or `text`, or `sentence1` and `sentence2`; quotes are ordinary characters.

    Raises:
        DataError: the file cannot be read, lacks a column, or has a line with too few fields.
    """
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            records = list(reader)
            names = reader.fieldnames or []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{file}: cannot be read ({reason}); give a .tsv file with labels") from error
    choices = (["sentence"], ["text"], ["sentence1", "sentence2"])
    columns = next((choice for choice in choices if {"label", *choice} <= set(names)), None)
    if columns is None or not records:
        what = f"its columns are {', '.join(names)}" if records else "it holds no texts"
        raise DataError(f"{file}: {what}; name them sentence and label, or sentence1, sentence2 and label")
    texts: list[str | tuple[str, str]] = []
    for number, record in enumerate(records, 2):
        found = [record[column] for column in columns]
        if None in (*found, record["label"]):
            raise DataError(f"{file}:{number}: fewer fields than the first line names; mend the line")
        texts.append(found[0] if len(found) == 1 else (found[0], found[1]))
    return texts, [record["label"] for record in records]
