"""How files hold text: which format a name or a file's first bytes tell, and the text column of each kind of table.

Rows are bytes, so that invalid UTF-8 is found row by row, or None where a row holds no text.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ..errors import ConfigurationError
from .problems import Problems
from .unpack import SUFFIXES as COMPRESSION_SUFFIXES

SUFFIXES = {
    ".txt": "txt", ".text": "txt",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".pq": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))
TABLES = ("parquet", "arrow")  # read in any order, so an archive of one is unpacked first
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
_ROWS_AT_ONCE = 65536
_ADVICE = "fetch the file again"


def format_of_name(path: str) -> str | None:
    """The format that a file's name tells, compressed or not."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSION_SUFFIXES:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix)


def format_of_bytes(head: bytes, text_field: str) -> str | None:
    """The format of a file that begins with these (unpacked) bytes; None for what is not text."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):  # a file; a stream
        return "arrow"
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        text = head.decode("utf-16" if head[:4] not in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") else "utf-32", "ignore")
    else:
        try:
            text = head.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if error.start < len(head) - 3:  # not just a character that the end of the sample cuts
                return None
            text = head[: error.start].decode("utf-8-sig")
        if "\0" in text:
            return None
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first.lstrip().startswith("{"):
        try:
            return "jsonl" if isinstance(json.loads(first), dict) else "txt"
        except ValueError:
            return "jsonl" if len(text.splitlines()) == 1 and first.lstrip()[1:2] in ("", '"') else "txt"
    for kind, delimiter in _DELIMITERS.items():
        if delimiter in first and text_field in next(csv.reader([first], delimiter=delimiter)):
            return kind
    return "txt"


# ---- nested fields


def find_text(value: Any, path: Sequence[str]) -> list[Any]:
    """The leaves at `path` inside a record, in order; lists are entered, and what they hold without the field is left out.

    Raises:
        KeyError: a record without the field, outside any list.
    """
    if isinstance(value, list):
        found = []
        for item in value:
            if item is not None and not (path and isinstance(item, dict) and item.get(path[0]) is None):
                found += find_text(item, path)
        return found
    if not path:
        return [value]
    if not isinstance(value, dict):
        raise KeyError(path[0])
    if value.get(path[0]) is None and path[0] in value and path[1:]:
        return []
    return find_text(value[path[0]], path[1:])


# ---- parquet and Arrow


def read_table(
    file_format: str, source: IO[bytes], name: str, place: str, problems: Problems, read_bytes: int
) -> Iterator[bytes | None]:
    """The column `name`, dotted for a nested field, of a parquet or Arrow file; lists are joined by newlines.

    Memory: about `read_bytes` of a parquet file, one record batch of an Arrow file.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigurationError(f"{place}: {file_format} needs pyarrow; pip install 'fastroberta[data]'") from error
    read = _read_parquet if file_format == "parquet" else _read_arrow
    try:
        for column, path in read(source, name, place, problems, read_bytes):
            yield from _rows(column, path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        problems.report(f"truncated or damaged {file_format} file", f"{place} ({reason})", _ADVICE)


def _read_parquet(
    source: IO[bytes], name: str, place: str, problems: Problems, read_bytes: int
) -> Iterator[tuple[Any, list[str]]]:
    from pyarrow import parquet

    table = parquet.ParquetFile(source, pre_buffer=False, buffer_size=read_bytes)
    if not (chosen := _choose_column(table.schema_arrow, name, place, problems)):
        return
    column, path = chosen
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        rows = int(read_bytes * metadata.num_rows / max(metadata.total_byte_size, 1))
        rows = min(max(rows, 1), _ROWS_AT_ONCE)
        for batch in table.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
            yield batch.column(0), path


def _read_arrow(
    source: IO[bytes], name: str, place: str, problems: Problems, read_bytes: int
) -> Iterator[tuple[Any, list[str]]]:
    from pyarrow import ipc

    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
    if not (chosen := _choose_column(reader.schema, name, place, problems)):
        return
    column, path = chosen
    options = ipc.IpcReadOptions(included_fields=[reader.schema.names.index(column)], use_threads=False)
    source.seek(0)
    reader = ipc.open_file(source, options=options) if is_file else ipc.open_stream(source, options=options)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in batches:
        for start in range(0, len(batch), _ROWS_AT_ONCE // 64):
            yield batch.column(0).slice(start, _ROWS_AT_ONCE // 64), path
    if not is_file:
        source.seek(-8, os.SEEK_END)
        if source.read(8) != _ARROW_END:  # pyarrow takes a stream that is cut between batches for a whole one
            problems.report("truncated arrow file", place, _ADVICE)


def _choose_column(schema: Any, name: str, place: str, problems: Problems) -> tuple[str, list[str]] | None:
    """A column and the path inside it that `name` means; a column that is itself called "a.b" comes first."""
    column, path = (name, []) if name in schema.names else (name.split(".")[0], name.split(".")[1:])
    if schema.names.count(column) == 1:
        fault = _find_type_fault(schema.field(column).type, path, name)
    else:
        fault = f"no column {name!r}"
    if fault:
        problems.report(fault, place, f"choose one of {', '.join(schema.names)} with --text-field")
        return None
    return column, path


def _find_type_fault(kind: Any, path: Sequence[str], name: str) -> str | None:
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _find_type_fault(kind.value_type, path, name)
    if path:
        if types.is_struct(kind) and kind.get_field_index(path[0]) >= 0:
            return _find_type_fault(kind.field(path[0]).type, path[1:], name)
        return f"no column {name!r}"
    return None if _is_text(kind) else f"column {name!r} holds {kind}, not text"


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _rows(column: Any, path: list[str]) -> Iterator[bytes | None]:
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if _is_text(kind):
        yield from column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()
        return
    for value in column.cast(_as_binary(kind)).to_pylist():
        leaves = [leaf for leaf in find_text(value, path) if leaf is not None] if value is not None else []
        yield b"\n".join(leaves) if leaves else None


def _as_binary(kind: Any) -> Any:
    """The type with binary in place of every string inside it."""
    import pyarrow
    from pyarrow import types

    if _is_text(kind):
        return pyarrow.large_binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pyarrow.large_list(_as_binary(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_binary(field.type)) for field in kind])
    return kind


# ---- csv and tsv


def read_csv(
    chunks: Iterator[bytes], file_format: str, name: str, place: str, problems: Problems, max_bytes: int
) -> Iterator[bytes | None]:
    """The column `name` of UTF-8 text with a header line; quoted fields may hold newlines and delimiters.

    A row that does not fit the header is damage: text with an unquoted delimiter would lose what follows it.
    """
    csv.field_size_limit(max_bytes)
    reader = csv.reader(_split_lines(chunks, max_bytes), delimiter=_DELIMITERS[file_format], strict=True)
    header: list[str] | None = None
    advice = "quote fields that hold delimiters, quotes or newlines, and double the quotes inside them"
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{place}, line {reader.line_num}"
            if "limit" in str(error) or header is None:
                problems.report(f"a row of over {max_bytes >> 20} MB", where, "look for a quote that is never closed")
                return  # where the next row begins is unknown
            problems.report(f"not a {file_format} row", where, f"({error}) {advice}")
            continue
        if not row:
            continue
        if header is None:
            header = row
            if header.count(name) != 1:
                names = ", ".join(header[:20])
                problems.report(f"no column {name!r}", place, f"choose one of {names} with --text-field")
                return
            column = header.index(name)
        elif len(row) > len(header):
            fault = f"{len(row)} fields for {len(header)} columns"
            problems.report("more fields than columns", f"{place}, line {reader.line_num} ({fault})", advice)
        else:
            yield row[column].encode("utf-8", "surrogateescape") if column < len(row) else None


def _split_lines(chunks: Iterator[bytes], max_bytes: int) -> Iterator[str]:
    """Lines with their ends; bytes that are not UTF-8 pass as surrogates."""
    buffer = b""
    for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "surrogateescape") + "\n"
        if len(buffer) > max_bytes:
            raise csv.Error("line larger than the limit")
    if buffer:
        yield buffer.decode("utf-8", "surrogateescape")
