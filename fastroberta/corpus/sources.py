"""Where text lies: local files, standard input, and whatever fsspec reaches.

A remote file is read in ranges. When a connection breaks off, reading goes on where it stopped, provided the file is
still the same; after several tries it ends in one line, and nothing half-read is kept. From a server that knows no
ranges the file is copied to a temporary one first.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import os
import posixpath
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

from ..errors import ConfigurationError, DataError
from .formats import FORMATS, format_of_bytes, format_of_name
from .problems import Problems
from .unpack import unpack

_TRIES = 4
PAUSE = 0.5  # seconds before the second try, doubled for each further one
_SAMPLE = 1 << 16
# What file systems call a tag or time of the contents, the best first.
_VERSIONS = (
    *("ETag", "etag", "blob_id", "Content-MD5", "Last-Modified", "LastModified", "last_modified"),
    *("mtime", "updated", "created"),
)


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus and what tells whether it changed."""

    path: str  # a path, a URL, or - for standard input
    format: str  # one of FORMATS
    size: int  # bytes
    modified: int | str  # nanoseconds; of a remote file its tag or time as the server gives it


def is_remote(path: str) -> bool:
    return "://" in path


def find_files(inputs: Iterable[str], format: str, text_field: str = "text") -> list[InputFile]:
    """The files that the inputs name: files as given, folders and globs sorted by path.

    Args:
        format: of all files; "auto" goes by their names, and looks into files whose names do not tell.
        text_field: by which a csv or tsv file without a telling name is known.
    Raises:
        ConfigurationError: nothing found, no way to tell a file's format, or a package is missing.
    """
    paths: dict[str, str] = {}  # each file once, in order, however its path is written
    for name in inputs:
        if name == "-":
            found = [name]
        elif is_remote(name):
            found = _find_remote(name, format)
        elif os.path.isdir(name):
            folder = os.path.normpath(name)
            found = _choose_in_folder(folder, _list_folder(folder), format)
        elif os.path.exists(name):
            found = [name]
        else:
            found = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
        if not found:
            raise ConfigurationError(f"{name}: no such file or folder, and no file matches it; check the path")
        for path in found:
            paths.setdefault(real_path(path), path)
    return [_identify(path, format, text_field) for path in paths.values()]


def real_path(path: str) -> str:
    """The same for every way to write the path of a local file; others stay as they are."""
    return path if path == "-" or is_remote(path) else os.path.realpath(path)


def _list_folder(folder: str) -> list[str]:
    """What lies in a folder and the folders below it, hidden ones aside. Links are followed, but no folder is read twice.

    Raises:
        OSError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[str] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        found += [os.path.join(place, name) for name in names]
        below = {os.path.realpath(os.path.join(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for path, name in below.items() if path not in seen and not name.startswith("."))
        seen |= below.keys()
    return found


def _choose_in_folder(folder: str, paths: list[str], format: str) -> list[str]:
    """The files of a folder that hold text: those whose names tell so, or else those whose names end in nothing.

    Where datasets.save_to_disk wrote, the data files are those that state.json lists.
    """
    start = len(folder.rstrip("/")) + 1
    paths = sorted(path for path in paths if not any(part.startswith(".") for part in path[start:].split("/")))
    states = [path for path in paths if posixpath.basename(path) == "state.json"]
    saved = {posixpath.dirname(path): names for path in states if (names := _read_saved(path)) is not None}
    paths = [
        path
        for path in paths
        if posixpath.basename(path) in saved.get(posixpath.dirname(path), [posixpath.basename(path)])
        and not (saved and posixpath.basename(path) == "dataset_dict.json")
    ]
    if format != "auto":
        return paths
    if chosen := [path for path in paths if format_of_name(path.partition("?")[0] if is_remote(path) else path)]:
        return chosen
    bare = [
        path for path in paths if "." not in posixpath.basename(path) and not posixpath.basename(path).startswith("_")
    ]
    if not bare:
        raise ConfigurationError(f"{folder}: this folder has no {', '.join(FORMATS)} files; give --format")
    return bare


def _read_saved(path: str) -> list[str] | None:
    """The data files that a state.json of datasets lists; None for another file of this name."""
    try:
        with open_input(_identify(path, "jsonl", "")) as file:
            return [entry["filename"] for entry in json.load(file)["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return None


def _identify(path: str, format: str, text_field: str) -> InputFile:
    modified: int | str
    if path == "-":
        spool, modified = _spool_standard_input()
        size = spool.seek(0, os.SEEK_END)
    elif is_remote(path):
        size, modified = _describe_remote(path)
    else:
        if not os.path.exists(path):
            raise ConfigurationError(
                f"{path}: a link to a file that does not exist; restore the file or remove the link"
            )
        if not os.path.isfile(path):
            raise ConfigurationError(f"{path}: not a regular file; copy it to one, or pipe it in and give -")
        status = os.stat(path)
        size, modified = status.st_size, status.st_mtime_ns
    kind = format if format != "auto" else format_of_name(path.partition("?")[0] if is_remote(path) else path)
    file = InputFile(path, kind or "", size, modified)
    if kind:
        return file
    with open_input(file) as raw:
        head = next(unpack(raw, path, Problems("skip"), _SAMPLE), b"")
    kind = format_of_bytes(head, text_field)
    if not kind:
        raise ConfigurationError(f"{path}: cannot tell its format from name or contents; give --format")
    return InputFile(path, kind, size, modified)


def open_input(file: InputFile) -> IO[bytes]:
    """The file, open for reading anywhere in it."""
    if file.path == "-":
        copy = open(os.dup(_spool_standard_input()[0].fileno()), "rb")  # noqa: SIM115, the caller closes it
        copy.seek(0)
        return copy
    if not is_remote(file.path):
        return open(file.path, "rb")
    raw: Any = _RemoteFile(file)
    return io.BufferedReader(raw, 1 << 20)


@functools.cache
def _spool_standard_input() -> tuple[IO[bytes], str]:
    """A copy in a temporary file, because text is read more than once, and its hash, to know the same text again."""
    spool, digest = tempfile.TemporaryFile(), hashlib.sha256()  # noqa: SIM115, lives as long as the program
    while data := sys.stdin.buffer.read(1 << 20):
        spool.write(data)
        digest.update(data)
    spool.flush()
    return spool, digest.hexdigest()


# ---- remote files


def _find_filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ConfigurationError(f"{path}: needs fsspec; pip install 'fastroberta[data]'") from error
    options: dict[str, Any] = {}
    try:
        if _is_http(path):
            from aiohttp import ClientTimeout

            # Its default ends every download after five minutes.
            options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
        return url_to_fs(path, **options)
    except ImportError as error:
        package = error.name or str(error).split("nstall ")[-1].split()[0]  # "Install s3fs to access S3"
        raise ConfigurationError(f"{path}: needs the package {package}; pip install {package}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}; check the address") from error


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _find_remote(name: str, format: str) -> list[str]:
    filesystem, path = _find_filesystem(name)
    try:
        filesystem.invalidate_cache()
        if "*" in path or ("[" in path and not _is_http(path)):
            found = filesystem.glob(path)
            return sorted(filesystem.unstrip_protocol(one) for one in found if not filesystem.isdir(one))
        # Over HTTP every address is a file, and asking whether one is a folder downloads it.
        if path.endswith("/") if _is_http(path) else filesystem.isdir(path):
            found = [filesystem.unstrip_protocol(one) for one in filesystem.find(path)]
            return _choose_in_folder(filesystem.unstrip_protocol(path), found, format)
        filesystem.info(path)
        return [name]
    except Exception as error:  # each file system has its own
        raise _explain(name, error) from error


def _explain(path: str, error: Exception) -> Exception:
    if isinstance(error, ConfigurationError | DataError):
        return error
    reason = error.__cause__ or error
    text = " ".join(f"{type(reason).__name__}: {reason}".split())
    if isinstance(error, FileNotFoundError):
        return ConfigurationError(f"{path}: not found ({text}); check the address")
    return DataError(f"{path}: cannot be read ({text}); check the address, the connection and the credentials")


def _describe_remote(path: str) -> tuple[int, str]:
    """Size in bytes, and a tag or time that changes with the contents."""
    filesystem, place = _find_filesystem(path)
    try:
        filesystem.invalidate_cache()
        info = filesystem.info(place)
    except Exception as error:
        raise _explain(path, error) from error
    if info.get("size") is None:
        raise ConfigurationError(f"{path}: its server does not report its size; download it first")
    return info["size"], next((str(info[name]) for name in _VERSIONS if info.get(name)), "")


class _RemoteFile(io.RawIOBase):
    """Reads ranges of a remote file; a try that fails is repeated on a new connection.

    Raises:
        DataError: all tries failed, or the file has changed since the run began.
    """

    def __init__(self, file: InputFile):
        self._file = file
        self._filesystem, self._path = _find_filesystem(file.path)
        self._handle: Any = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self._position)
        if size <= 0:
            return 0
        needs_copy = False
        for number in range(_TRIES):
            try:
                if self._handle is None:
                    self._handle = self._connect(needs_copy)
                self._handle.seek(self._position)
                data = self._handle.read(size)
                if not data:
                    raise EOFError("the connection ended early")
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
            except DataError:
                raise
            except Exception as error:  # each file system has its own
                self._handle, failure = None, error
                needs_copy = needs_copy or (isinstance(error, ValueError) and "range request" in str(error))
            time.sleep(PAUSE * 2**number if number + 1 < _TRIES else 0)
        text = " ".join(f"{type(failure).__name__}: {failure}".split())
        raise DataError(
            f"{self._file.path}: reading failed at byte {self._position:,} of {self._file.size:,}, {_TRIES} times "
            f"({text}); run the same command again later, finished work is kept"
        ) from failure

    def _connect(self, needs_copy: bool) -> Any:
        if _describe_remote(self._file.path) != (self._file.size, self._file.modified):
            raise DataError(f"{self._file.path}: changed while it was being read; start again")
        if not needs_copy:
            return self._filesystem.open(self._path, "rb")
        copy = tempfile.TemporaryFile()  # noqa: SIM115, closed with this file
        self._filesystem.get_file(self._path, copy)
        if copy.tell() != self._file.size:
            raise EOFError("the connection ended early")
        return copy
