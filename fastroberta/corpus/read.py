"""Files -> chunks of whole records -> documents.

One process reads every file in order and cuts it into chunks of a few megabytes that end where a record ends; chunks
are what workers take. Cutting depends on the text alone, so that a second run finds the same chunks.

Whatever is wrong with the input goes through `Problems`: with the policy "error" the first fault stops the program;
with "skip" what has one right reading is mended (byte order marks and NULs are removed, carriage returns become line
ends), what has not is left out (a record, or the rest of a damaged file), and all is counted.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from ..errors import ConfigurationError, DataError

CHUNK_BYTES = 8 << 20  # of text in one chunk of work
MAX_RECORD_BYTES = 16 << 20  # of one document, or of one line of JSON; more is a file that is not what it seems
MAX_EXPANSION = 200  # text shrinks 3- to 10-fold; this much is an accident or an attack
SUFFIXES = {
    ".txt": "txt", ".text": "txt",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst", ".zstd")
Data = bytes | list[bytes | None]  # lines, or rows of a parquet column
_CHUNK = 1 << 20
_JSON_LINES = "write one object a line (JSON Lines)"
_BLANK_LINES = re.compile(rb"\n[ \t]*\n")


class Problems:
    """Faults of the input: refused, or counted by kind."""

    def __init__(self, policy: str):
        self.refuse = policy == "error"
        self.counts: Counter[str] = Counter()

    def report(self, kind: str, where: str, advice: str, count: int = 1) -> None:
        """Raise DataError, or count and return: the caller then mends, or leaves out, what is at fault."""
        if self.refuse:
            raise DataError(f"{where}: {kind}; {advice}, or mend or leave out such input with --on-bad-input skip")
        self.counts[kind] += count


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus and what tells whether it changed."""

    path: str
    format: str  # txt, jsonl or parquet
    size: int  # bytes
    modified: int  # nanoseconds


@dataclass
class Chunk:
    """Whole records of one file."""

    file: InputFile
    file_number: int
    number: int  # within the file
    first_record: int  # number of the first line, or row, counted from 1
    data: Data
    input_bytes: int = 0  # of the file, as it lies on the disk, that were read for this chunk
    problems: Counter[str] = field(default_factory=Counter)  # found while reading

    def size(self) -> int:
        """Bytes of text, with what is around it in JSON."""
        return len(self.data) if isinstance(self.data, bytes) else sum(len(text or b"") for text in self.data)


def find_files(inputs: Iterable[str], format: str) -> list[InputFile]:
    """The files that the inputs name: files as given, folders and globs sorted by path.

    Raises:
        ConfigurationError: nothing found, or no way to tell a file's format.
    """
    paths: dict[str, None] = {}  # each file once, in order
    for name in inputs:
        if os.path.isdir(name):
            inside = [path for path in Path(name).rglob("*") if path.is_file() and not _is_hidden(path, name)]
            known = sorted(str(path) for path in inside if format != "auto" or _format_of(path.name))
            paths |= dict.fromkeys(known)
            if not known:
                raise ConfigurationError(f"{name}: a folder without txt, jsonl or parquet files; say --format")
        elif os.path.exists(name):
            paths[name] = None
        elif matches := sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path)):
            paths |= dict.fromkeys(matches)
        else:
            raise ConfigurationError(f"{name}: no such file or folder, and nothing that it matches; check the path")
    files = []
    for path in paths:
        kind = _format_of(path) if format == "auto" else format
        if not kind:
            raise ConfigurationError(f"{path}: its name does not tell its format; say --format txt, jsonl or parquet")
        if not os.path.isfile(path):
            raise ConfigurationError(f"{path}: not an ordinary file; write it to one first")
        status = os.stat(path)
        files.append(InputFile(path, kind, status.st_size, status.st_mtime_ns))
    return files


def _is_hidden(path: Path, folder: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _format_of(path: str) -> str | None:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix)


def read_chunks(
    file: InputFile, file_number: int, *, txt_documents: str, text_field: str, policy: str
) -> Iterator[Chunk]:
    """The chunks of a file, in order. Every file has a last one, perhaps empty, that carries what was found last.

    Memory: two chunks, or twice the longest record.
    """
    problems = Problems(policy)
    if file.size == 0:
        problems.report("empty file", file.path, "remove it")
        yield Chunk(file, file_number, 0, 1, b"", 0, problems.counts)
        return
    try:
        with open(file.path, "rb") as raw:
            contents: Iterator[tuple[int, Data]]
            if file.format == "parquet":
                contents = _read_parquet(file, raw, text_field, problems)
            else:
                contents = _cut_lines(file, _decompress(file, raw, problems), txt_documents, problems)
            position = 0
            for number, (first_record, data) in enumerate(contents):
                read = max(0, raw.tell() - position)
                yield Chunk(file, file_number, number, first_record, data, read, problems.counts)
                problems.counts = Counter()
                position += read
    except OSError as error:
        raise DataError(f"{file.path}: {error.strerror or error}; make it readable and start again") from error


def _decompress(file: InputFile, raw: IO[bytes], problems: Problems) -> Iterator[bytes]:
    """The bytes of a file, unpacked if its first bytes say that it is gzip or zstd; never much more than _CHUNK."""
    magic = raw.read(4)
    raw.seek(0)
    chunks: Iterator[bytes]
    advice = "fetch the file again"
    if magic[:2] == b"\x1f\x8b":
        chunks = _unpack_gzip(raw)
    elif magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50):
        if not _zstd_is_whole(raw):
            problems.report("truncated zstd archive", file.path, advice)
        raw.seek(0)
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
        chunks = iter(lambda: reader.read(_CHUNK), b"")
    else:
        chunks = iter(lambda: raw.read(_CHUNK), b"")
    expanded = 0
    try:
        for chunk in chunks:
            expanded += len(chunk)
            if expanded > 64 * _CHUNK and expanded > MAX_EXPANSION * raw.tell():
                fault = f"unpacks to over {MAX_EXPANSION} times its size"
                problems.report(fault, file.path, "unpack it yourself if you trust it")
                return
            yield chunk
    except EOFError:
        problems.report("truncated gzip archive", file.path, advice)
    except (zlib.error, zstandard.ZstdError) as error:
        problems.report(f"damaged archive ({error})", file.path, advice)


def _unpack_gzip(raw: IO[bytes]) -> Iterator[bytes]:
    """zlib checks each member's checksum; Python's gzip module would lose what it unpacked before a fault."""
    pending = raw.read(_CHUNK)
    while pending:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            chunk = member.decompress(pending, _CHUNK)
            if not chunk and not pending and not member.eof:
                raise EOFError
            yield chunk
            pending = member.unconsumed_tail or (b"" if member.eof else raw.read(_CHUNK))
        pending = member.unused_data or raw.read(_CHUNK)
        while pending and not pending.strip(b"\0"):  # tapes and some tools pad with zeros
            pending = raw.read(_CHUNK)


def _zstd_is_whole(raw: IO[bytes]) -> bool:
    """Whether the last frame has its last block and its checksum, which the library does not check at the file's end.

    Walks the block headers (RFC 8878, section 3.1.1) without unpacking. Data that is no frame is left to the library.
    """
    size = os.fstat(raw.fileno()).st_size
    position = 0
    while position < size:
        raw.seek(position)
        header = raw.read(18)
        if header[1:4] == b"\x2a\x4d\x18" and header[0] & 0xF0 == 0x50:  # a skippable frame
            position += 8 + int.from_bytes(header[4:8], "little")
            continue
        if header[:4] != b"\x28\xb5\x2f\xfd":
            return size - position >= 4
        try:
            parameters = zstandard.get_frame_parameters(header)
            position += zstandard.frame_header_size(header)
        except zstandard.ZstdError:
            return len(header) == 18
        is_last = False
        while not is_last:
            raw.seek(position)
            block = int.from_bytes(raw.read(3).ljust(3, b"\xff"), "little")
            is_last, is_repeated = bool(block & 1), block >> 1 & 3 == 1
            position += 3 + (1 if is_repeated else block >> 3)
            if position > size:
                return False
        position += 4 * parameters.has_checksum
    return position == size


def _cut_lines(
    file: InputFile, chunks: Iterator[bytes], txt_documents: str, problems: Problems
) -> Iterator[tuple[int, Data]]:
    """Text -> (number of the first line, whole records of about CHUNK_BYTES)."""
    by_blank_line = file.format == "txt" and txt_documents == "blank-line"
    what = "document (text between blank lines)" if by_blank_line else "line"
    advice = "if each line is a document, say --txt-documents line" if by_blank_line else "split it"
    advice += f", or {_JSON_LINES}" if file.format == "jsonl" else ""
    line, buffer, discarding = 1, b"", False
    for chunk in _normalize(file, chunks, problems):
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


def _normalize(file: InputFile, chunks: Iterator[bytes], problems: Problems) -> Iterator[bytes]:
    """Text without a byte order mark, its lines ended by line feeds.

    In JSON lines too: a value holds no bare carriage return, only an escaped one.
    """
    line, is_first, held = 1, True, b""
    for chunk in chunks:
        chunk = held + chunk
        if is_first and chunk:
            is_first = False
            if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                problems.report("UTF-16 text", file.path, "convert it to UTF-8")
                return
            if chunk.startswith(codecs.BOM_UTF8):
                problems.report("byte order mark", f"{file.path}, line 1", "remove it")
                chunk = chunk[3:]
        held = b""
        if b"\r" in chunk:
            if chunk.endswith(b"\r"):
                chunk, held = chunk[:-1], b"\r"  # perhaps half of a CR LF
            if count := chunk.count(b"\r"):
                first = line + chunk.count(b"\n", 0, chunk.find(b"\r"))
                problems.report("carriage return", f"{file.path}, line {first}", "end lines with LF alone", count)
                chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line += chunk.count(b"\n")
        yield chunk
    if held:
        problems.report("carriage return", f"{file.path}, line {line}", "end lines with LF alone")
        yield b"\n"


def _read_parquet(file: InputFile, raw: IO[bytes], text_field: str, problems: Problems) -> Iterator[tuple[int, Data]]:
    """One column of a parquet file -> (number of the first row, rows of about CHUNK_BYTES)."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError(f"{file.path}: parquet needs pyarrow; pip install 'fastroberta[data]'") from error
    row, size = 1, 0
    rows: list[bytes | None] = []
    try:
        with _open_parquet(file, raw, problems) as source:
            table = parquet.ParquetFile(source, pre_buffer=False, buffer_size=_CHUNK)
            for text in _read_column(table, text_field, file, problems):
                rows.append(text)
                size += len(text or b"")
                if size >= CHUNK_BYTES:
                    yield row, rows
                    row, rows, size = row + len(rows), [], 0
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        problems.report("truncated or damaged parquet file", f"{file.path} ({reason})", "fetch it again")
    yield row, rows


def _open_parquet(file: InputFile, raw: IO[bytes], problems: Problems) -> IO[bytes]:
    """A parquet file is read from its end: one inside an archive is unpacked to a nameless temporary file first."""
    is_bare = raw.read(4) == b"PAR1"
    raw.seek(0)
    if is_bare:
        return os.fdopen(os.dup(raw.fileno()), "rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
    for chunk in _decompress(file, raw, problems):
        unpacked.write(chunk)
    unpacked.seek(0)
    return unpacked


def _read_column(table: Any, name: str, file: InputFile, problems: Problems) -> Iterator[bytes | None]:
    """The rows of one column, read a megabyte or so at a time however large the row groups are."""
    import pyarrow

    names = table.schema_arrow.names
    fault = None if names.count(name) == 1 else f"no column {name!r}"
    if not fault:
        kind = table.schema_arrow.field(name).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            fault = f"column {name!r} holds {kind}, not text"
    if fault:
        problems.report(fault, file.path, f"choose one of {', '.join(names)} with --text-field")
        return
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        batch_rows = int(_CHUNK * metadata.num_rows / max(metadata.total_byte_size, 1))
        batch_rows = min(max(batch_rows, 1), 65536)
        for batch in table.iter_batches(batch_rows, row_groups=[group], columns=[name], use_threads=False):
            # As bytes, so that invalid UTF-8 is found row by row.
            yield from batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist()


def read_documents(chunk: Chunk, *, txt_documents: str, text_field: str, problems: Problems) -> Iterator[str]:
    """The documents of a chunk: strings without NULs, carriage returns and lone surrogates, perhaps empty."""
    kind = chunk.file.format
    for where, data in _read_records(chunk, by_blank_line=kind == "txt" and txt_documents == "blank-line"):
        place = f"{chunk.file.path}, {'row' if kind == 'parquet' else 'line'} {where}"
        if data is None:
            problems.report(f"no text in {text_field!r}", place, "fill the row or remove it")
            continue
        if len(data) > MAX_RECORD_BYTES:
            problems.report(f"a document of over {MAX_RECORD_BYTES >> 20} MB", place, "split it")
            continue
        try:
            text: Any = data.decode()
        except UnicodeDecodeError as error:
            place += f", byte {error.start + 1} of the record"
            problems.report("invalid UTF-8", place, "convert the file to UTF-8")
            continue
        if kind == "jsonl":
            text = _parse_json(text, text_field, place, problems)
            if text is None:
                continue
        if "\0" in text:
            problems.report("NUL", place, "remove it", text.count("\0"))
            text = text.replace("\0", "")
        if "\r" in text:  # escaped in JSON, or in a parquet row: of files _normalize took care
            problems.report("carriage return", place, "end lines with LF alone", text.count("\r"))
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
        names = ", ".join(map(str, list(record)[:10]))
        if text_field in record:
            fault, advice = f"field {text_field!r} is not a string", "make it one, or name another field"
        else:
            fault, advice = f"no text in {text_field!r}", "name the field"
        problems.report(fault, place, f"{advice} with --text-field (there: {names})")
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        problems.report("lone surrogate", place, "write characters beyond U+FFFF as pairs or as UTF-8")
        return None
    return text
