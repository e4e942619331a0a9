"""Files -> chunks of whole records -> documents.

One process reads every file in order and cuts it into chunks of a few megabytes that end where a record ends; chunks
are what workers take. Where chunks end depends on the text alone, so a second run finds the same ones.

Text is repaired where nothing is lost: UTF-16 becomes UTF-8, byte order marks and NUL characters go, and carriage returns
become line ends. What is damaged, a record or the rest of a file, goes through `Problems`. All of it is counted.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from ..errors import DataError
from .formats import TABLES, find_text, read_csv, read_table
from .problems import Problems
from .sources import InputFile, open_input
from .unpack import recognize, unpack

CHUNK_BYTES = 8 << 20  # of text in one chunk of work
MAX_RECORD_BYTES = 16 << 20  # of one document, or of one line of JSON; more is a file that is not what it seems
READ_BYTES = 1 << 20
Data = bytes | list[bytes | None]  # lines, or rows of a column
_JSON_LINES = "write one object a line (JSON Lines)"
_BLANK_LINES = re.compile(rb"\n[ \t]*\n")
_UTF8_ADVICE = "convert the file to UTF-8"


@dataclass
class Chunk:
    """Whole records of one file."""

    file: InputFile
    file_number: int
    number: int  # within the file
    first_record: int  # number of the first line, or row, counted from 1
    data: Data
    input_bytes: int = 0  # of the file, as it is stored, that were read for this chunk
    problems: Counter[str] = field(default_factory=Counter)  # found while reading

    def size(self) -> int:
        """Bytes of text, with what is around it in JSON."""
        return len(self.data) if isinstance(self.data, bytes) else sum(len(text or b"") for text in self.data)


def read_chunks(
    file: InputFile, file_number: int, *, txt_documents: str, text_field: str, policy: str
) -> Iterator[Chunk]:
    """The chunks of a file, in order. Every file has a last one, perhaps empty, that carries what was found last.

    Memory: two chunks, or twice the longest record; a record batch of an Arrow file.

    Raises:
        DataError: a file that cannot be read, or a fault under the policy "error".
    """
    problems = Problems(policy)
    if file.size == 0:
        problems.report("empty file", file.path, "remove it")
        yield Chunk(file, file_number, 0, 1, b"", 0, problems.counts)
        return
    try:
        with open_input(file) as raw:
            position = 0
            for number, (first_record, data) in enumerate(_read(file, raw, txt_documents, text_field, problems)):
                read = max(0, raw.tell() - position)
                yield Chunk(file, file_number, number, first_record, data, read, problems.counts)
                problems.counts = Counter()
                position += read
    except OSError as error:
        raise DataError(f"{file.path}: {error.strerror or error}; make it readable and start again") from error


def _read(
    file: InputFile, raw: IO[bytes], txt_documents: str, text_field: str, problems: Problems
) -> Iterator[tuple[int, Data]]:
    if file.format in TABLES:
        source = _unpack_whole(file, raw, problems)
        yield from _group_rows(read_table(file.format, source, text_field, file.path, problems, READ_BYTES))
        return
    chunks = _normalize(_to_utf8(unpack(raw, file.path, problems, READ_BYTES), file, problems), problems)
    if file.format in ("csv", "tsv"):
        yield from _group_rows(read_csv(chunks, file.format, text_field, file.path, problems, MAX_RECORD_BYTES))
    else:
        yield from _cut_lines(file, chunks, txt_documents, problems)


def _unpack_whole(file: InputFile, raw: IO[bytes], problems: Problems) -> IO[bytes]:
    """A table is read in any order: one inside an archive is unpacked to a nameless temporary file first."""
    is_packed = recognize(raw.read(10))
    raw.seek(0)
    if not is_packed:
        return raw
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115, goes when the last chunk is read
    for chunk in unpack(raw, file.path, problems, READ_BYTES):
        unpacked.write(chunk)
    unpacked.seek(0)
    return unpacked


def _group_rows(rows: Iterable[bytes | None]) -> Iterator[tuple[int, Data]]:
    """Rows -> (number of the first, rows of about CHUNK_BYTES)."""
    first, size = 1, 0
    group: list[bytes | None] = []
    for text in rows:
        group.append(text)
        size += len(text or b"")
        if size >= CHUNK_BYTES:
            yield first, group
            first, group, size = first + len(group), [], 0
    yield first, group


def _to_utf8(chunks: Iterator[bytes], file: InputFile, problems: Problems) -> Iterator[bytes]:
    """UTF-16 and UTF-32 with a byte order mark become UTF-8; UTF-8 loses its mark; the rest passes as it is."""
    head = b""
    while len(head) < 4 and (chunk := next(chunks, b"")):
        head += chunk
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        if head.startswith(codecs.BOM_UTF8):
            problems.repair("byte order mark")
            head = head[3:]
        yield head
        yield from chunks
        return
    problems.repair("UTF-16 or UTF-32 text")
    # A lone surrogate becomes invalid UTF-8, which is found in the record where it is.
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        yield decoder.decode(head).encode("utf-8", "surrogatepass")
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        problems.report(f"damaged {encoding.upper()} text", f"{file.path} ({error.reason})", _UTF8_ADVICE)


def _normalize(chunks: Iterator[bytes], problems: Problems) -> Iterator[bytes]:
    """Text with lines that end in line feeds.

    In JSON lines too: a value holds no bare carriage return, only an escaped one.
    """
    held = b""
    for chunk in chunks:
        chunk, held = held + chunk, b""
        if b"\r" in chunk:
            if chunk.endswith(b"\r"):
                chunk, held = chunk[:-1], b"\r"  # perhaps half of a CR LF
            if count := chunk.count(b"\r"):
                problems.repair("carriage return", count)
                chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield chunk
    if held:
        problems.repair("carriage return")
        yield b"\n"


def _cut_lines(
    file: InputFile, chunks: Iterator[bytes], txt_documents: str, problems: Problems
) -> Iterator[tuple[int, Data]]:
    """Text -> (number of the first line, whole records of about CHUNK_BYTES)."""
    by_blank_line = file.format == "txt" and txt_documents == "blank-line"
    what = "document (text between blank lines)" if by_blank_line else "line"
    advice = "if each line is a document, say --txt-documents line" if by_blank_line else "split it"
    advice += f", or {_JSON_LINES}" if file.format == "jsonl" else ""
    line, buffer, discarding = 1, b"", False
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= (1 if discarding else CHUNK_BYTES):
            if discarding:
                cut = _find_record_end(buffer, 0, by_blank_line)
            else:
                cut = _find_last_record_end(buffer[:CHUNK_BYTES], by_blank_line) or _find_record_end(
                    buffer, CHUNK_BYTES - 1, by_blank_line
                )
            if cut == 0 and len(buffer) > MAX_RECORD_BYTES and not discarding:
                problems.report(f"a {what} of over {MAX_RECORD_BYTES >> 20} MB", f"{file.path}, line {line}", advice)
                discarding = True
            keep = cut or (max(0, len(buffer) - 64) if discarding else 0)  # 64: a separator may be cut in two
            if keep == 0:
                break
            if not discarding:
                yield line, buffer[:keep]
            discarding = discarding and not cut
            line += buffer.count(b"\n", 0, keep)
            buffer = buffer[keep:]
            if not cut:
                break
    yield line, b"" if discarding else buffer


def _find_last_record_end(data: bytes, by_blank_line: bool) -> int:
    """Where the last whole record ends, 0 if there is none."""
    if not by_blank_line:
        return data.rfind(b"\n") + 1
    end = data.rfind(b"\n\n")
    if end >= 0:
        return end + 2
    for match in _BLANK_LINES.finditer(data):  # blank lines with spaces in them are rare
        end = match.end()
    return max(end, 0)


def _find_record_end(data: bytes, start: int, by_blank_line: bool) -> int:
    """Where the first record that ends after `start` ends, 0 if none does."""
    if not by_blank_line:
        return data.find(b"\n", start) + 1
    match = _BLANK_LINES.search(data, max(0, start - 64))
    return match.end() if match else 0


def read_documents(chunk: Chunk, *, txt_documents: str, text_field: str, problems: Problems) -> Iterator[str]:
    """The documents of a chunk: strings without NULs, carriage returns and lone surrogates, perhaps empty."""
    kind = chunk.file.format
    is_rows = isinstance(chunk.data, list)
    for where, data in _read_records(chunk, by_blank_line=kind == "txt" and txt_documents == "blank-line"):
        place = f"{chunk.file.path}, {'row' if is_rows else 'line'} {where}"
        if data is None:
            problems.report(f"no text in {text_field!r}", place, "fill the row or remove it")
            continue
        if len(data) > MAX_RECORD_BYTES:
            problems.report(f"a document of over {MAX_RECORD_BYTES >> 20} MB", place, "split it")
            continue
        try:
            text: Any = data.decode()
        except UnicodeDecodeError as error:
            problems.report("invalid UTF-8", f"{place}, byte {error.start + 1} of the record", _UTF8_ADVICE)
            continue
        if kind == "jsonl":
            text = _parse_json(text, text_field, place, problems)
            if text is None:
                continue
        if "\0" in text:
            count = text.count("\0")
            if count > len(text) / 10:
                advice = f"this is not text, or UTF-16 without a mark: {_UTF8_ADVICE}"
                problems.report("NUL characters throughout", place, advice)
                continue
            problems.repair("NUL character", count)
            text = text.replace("\0", "")
        if "\r" in text:  # escaped in JSON, or in a row: of text files _normalize took care
            problems.repair("carriage return", text.count("\r"))
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield text


def _read_records(chunk: Chunk, *, by_blank_line: bool) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each record; blank ones only separate others."""
    if isinstance(chunk.data, list):
        yield from enumerate(chunk.data, chunk.first_record)
        return
    lines = enumerate(chunk.data.split(b"\n"), chunk.first_record)
    if not by_blank_line:
        yield from ((number, line) for number, line in lines if line and not line.isspace())
        return
    document: list[bytes] = []
    first = chunk.first_record
    for number, line in lines:
        if line and not line.isspace():
            if not document:
                first = number
            document.append(line)
        elif document:
            yield first, b"\n".join(document)
            document = []
    if document:
        yield first, b"\n".join(document)


def _parse_json(line: str, text_field: str, place: str, problems: Problems) -> str | None:
    """The text of a JSON record, or None when it is left out."""
    try:
        record = json.loads(line)
    except RecursionError:
        problems.report("JSON nested too deep", place, "flatten it")
        return None
    except ValueError as error:
        is_array = line.lstrip().startswith("[")  # over many lines
        problems.report("JSON array" if is_array else "not a JSON record", place, f"({error}) {_JSON_LINES}")
        return None
    if not isinstance(record, dict):
        problems.report("JSON array" if isinstance(record, list) else "not a JSON object", place, _JSON_LINES)
        return None
    text = record.get(text_field)
    if not isinstance(text, str):
        text = _find_nested(record, text_field, place, problems)
        if text is None:
            return None
    try:
        text.encode()
    except UnicodeEncodeError:
        problems.report("lone surrogate", place, "write characters beyond U+FFFF as pairs or as UTF-8")
        return None
    return text


def _find_nested(record: dict[str, Any], text_field: str, place: str, problems: Problems) -> str | None:
    """The text at a dotted path, lists joined by newlines, or None when it is left out."""
    try:
        leaves = find_text(record, [text_field] if text_field in record else text_field.split("."))
    except KeyError:
        leaves = []
    if leaves and all(isinstance(leaf, str) for leaf in leaves):
        return "\n".join(leaves)
    names = ", ".join(map(str, list(record)[:10]))
    if leaves:
        fault, advice = f"field {text_field!r} is not a string", "make it one, or name another field"
    else:
        fault, advice = f"no text in {text_field!r}", "name the field"
    problems.report(fault, place, f"{advice} with --text-field (there: {names})")
    return None
