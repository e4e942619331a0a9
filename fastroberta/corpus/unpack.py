"""Compressed bytes -> bytes: gzip, bzip2, xz and zstd, recognized by their first bytes.

A truncated or damaged archive is reported after what could be unpacked of it. Expansion is bounded.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import zstandard

from .problems import Problems

MAX_EXPANSION = 200  # text shrinks 3- to 10-fold; this much is an accident or an attack
SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_OPEN: dict[str | None, Callable[[IO[bytes]], Any]] = {
    None: lambda raw: raw,
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
_ZSTD_INPUT = 2048  # bytes unpacked at once: a zstd block of 4 bytes can hold 128 KiB, so this makes at most 64 MiB


def recognize(head: bytes) -> str | None:
    """The compression that a file's first bytes announce: gzip, bzip2, xz, zstd or None."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):  # or text may begin so
        return "bzip2"
    if head[:6] == b"\xfd7zXZ\0":
        return "xz"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "zstd"
    return None


def unpack(raw: IO[bytes], path: str, problems: Problems, read_bytes: int) -> Iterator[bytes]:
    """The contents of a file from its start, unpacked if it is compressed, about `read_bytes` at a time."""
    raw.seek(0)
    compression = recognize(raw.read(10))
    raw.seek(0)
    parts = _unpack_zstd(raw) if compression == "zstd" else _read(_OPEN[compression](raw), read_bytes)
    expanded = 0
    try:
        for chunk in _gather(parts, read_bytes):
            expanded += len(chunk)
            if expanded > 64 * read_bytes and expanded > MAX_EXPANSION * raw.tell():
                fault = f"unpacks to over {MAX_EXPANSION} times its size"
                problems.report(fault, path, "unpack it yourself if you trust it")
                return
            yield chunk
    except EOFError:
        problems.report(f"truncated {compression} archive", path, "fetch the file again")
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
        if compression is None or (isinstance(error, OSError) and error.errno):  # the disk's fault, not the archive's
            raise
        problems.report(f"damaged {compression} archive ({error})", path, "fetch the file again")


def _read(file: Any, read_bytes: int) -> Iterator[bytes]:
    """read1 returns what it has unpacked; read would collect more and lose it all at a fault."""
    return iter(lambda: file.read1(read_bytes), b"")


def _unpack_zstd(raw: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: zstandard's stream reader takes the end of a truncated file for the end of its data."""
    frame, is_whole = _start_frame(), True
    while data := (frame.unused_data if frame.eof else b"") or raw.read(_ZSTD_INPUT):
        if frame.eof:
            frame = _start_frame()
        yield frame.decompress(data)
        is_whole = frame.eof
    if not is_whole:
        raise EOFError


def _start_frame() -> Any:
    return zstandard.ZstdDecompressor().decompressobj(write_size=1 << 14)


def _gather(parts: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Join small parts to at least `size` bytes; what comes before a fault is passed on before it is raised."""
    gathered, count = [], 0
    try:
        for part in parts:
            gathered.append(part)
            count += len(part)
            if count >= size:
                yield b"".join(gathered)
                gathered, count = [], 0
    except Exception:
        yield b"".join(gathered)
        raise
    yield b"".join(gathered)
