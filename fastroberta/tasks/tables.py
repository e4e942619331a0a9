"""Files of labelled examples, read as records with their line numbers: tables, CoNLL columns, SQuAD and RACE."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError

LONGEST_FIELD = 1 << 24  # characters in .csv, where Python's own limit is 131,072
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".conll", ".json")
_BLANKS = re.compile("[ \t]+")  # not all white space: a word may hold a no-break space, as 10 000 does


@dataclass(frozen=True)
class Table:
    """The records of a file.

    Attributes:
        numbers: for each record, its line in the file, or its row in parquet.
        num_skipped: number of records left out because they have too few or too many fields.
    """

    path: Path
    records: list[dict[str, Any]]
    numbers: list[int]
    num_skipped: int = 0

    def place(self, index: int) -> str:
        """Where a record is, for messages: `FILE:LINE`."""
        return f"{self.path}:{self.numbers[index]}"

    def require(self, columns: Sequence[str], hint: str) -> None:
        """Raise DataError if a record lacks a column; `hint` says what to do about it."""
        for index, record in enumerate(self.records):
            for name in columns:
                if name not in record:
                    # The first record stands for the file; in .jsonl, a later line may differ from it.
                    where = self.place(index) if index else self.path
                    has = ", ".join(map(str, record))
                    raise DataError(f"{where}: no column {name!r}, it has {has}; {hint}")


def read_table(path: Path, header: Sequence[str] | None = None, skip_broken: bool = False) -> Table:
    """All records of a file. Its suffix gives the format.

    In .tsv, tabs separate fields and quotes are ordinary characters, as in GLUE's files. In .conll, the first column is
    the word, the last one its tag, and a blank line ends a sentence; a record holds the lists `words` and `tags`. A .json
    file has SQuAD's format: records hold `id`, `context`, `question` and `answers`, which is
    {"text": [...], "answer_start": [...]}. A directory has RACE's: records hold `id`, `text`, `question`, `choices` and
    `label`.

    Args:
        header: names of the columns, if the first line does not give them.
        skip_broken: leave out and count the lines of a .tsv whose number of fields differs from the header's (QQP has a
            few); otherwise such a line is an error.
    Raises:
        DataError: the file cannot be read or holds no records. ConfigurationError: unknown suffix, or pyarrow is missing.
    """
    readers = {
        ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".conll": _read_conll, ".json": _read_squad,
    }  # fmt: skip
    num_skipped = 0
    try:
        if path.suffix == ".tsv":
            records, numbers = [], []
            for number, fields, names in _split_tsv(path, header):
                if len(fields) == len(names):
                    records.append(dict(zip(names, fields)))
                    numbers.append(number)
                elif skip_broken:
                    num_skipped += 1
                else:
                    raise DataError(
                        f"{path}:{number}: expected {len(names)} fields, as in the header, found {len(fields)}; "
                        "fix the line"
                    )
        elif path.suffix in readers or path.is_dir():
            pairs = list((_read_race if path.is_dir() else readers[path.suffix])(path))
            records, numbers = [record for _, record in pairs], [number for number, _ in pairs]
        else:
            raise ConfigurationError(f"{path}: unknown format; its name must end in {', '.join(SUFFIXES)}")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); give another file") from error
    if not records:
        raise DataError(f"{path}: contains no records; give a file with examples")
    return Table(path, records, numbers, num_skipped)


def _split_tsv(path: Path, header: Sequence[str] | None) -> Iterator[tuple[int, list[str], Sequence[str]]]:
    # Not splitlines(): a text may hold a form feed, a carriage return or a Unicode line separator.
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    names = header
    for number, line in enumerate(lines, start=1):
        fields = line.removesuffix("\r").split("\t")
        if names is None:
            names = fields
        elif line.strip():
            yield number, fields, names


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            names = next(reader, [])
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(names):
                    raise DataError(
                        f"{path}:{reader.line_num}: expected {len(names)} fields, as in the header, found {len(fields)}; "
                        "put fields that contain commas in quotes"
                    )
                yield reader.line_num, dict(zip(names, fields))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not csv ({error}); fix the line") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); fix the line") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: not a JSON object; write {{...}} with the columns by name")
            yield number, record


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError(f"{path}: parquet needs pyarrow; pip install 'fastroberta[finetune]'") from error
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not parquet ({' '.join(str(error).split())}); give another file") from error
    yield from enumerate(table.to_pylist(), start=1)


def _read_conll(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    words: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in enumerate([*path.read_text(encoding="utf-8-sig").split("\n"), ""], start=1):
        columns = _BLANKS.split(line.strip(" \t"))
        columns = columns if columns[0] else []
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise DataError(f"{path}:{number}: one column; a line begins with a word and ends with its tag")
            start = start if words else number
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            yield start, {"words": words, "tags": tags}
            words, tags = [], []


def _read_squad(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    number += 1
                    answers = [] if one.get("is_impossible") else one.get("answers", [])
                    spans = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
                    record = {"id": one["id"], "context": paragraph["context"], "question": one["question"]}
                    yield number, record | {"answers": spans}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not in SQuAD's format ({type(error).__name__}: {error}); see docs/finetune.md"
        ) from error


def _read_race(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for file in sorted(path.rglob("*.txt")):
        try:
            passage = json.loads(file.read_text(encoding="utf-8"))
            questions = zip(passage["questions"], passage["options"], passage["answers"], strict=True)
            for place, (question, choices, label) in enumerate(questions):
                number += 1
                record = {"id": f"{passage['id']}-{place}", "text": passage["article"], "question": question}
                yield number, record | {"choices": choices, "label": label}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not in RACE's format ({type(error).__name__}: {error}); fix the file") from error
