"""Paths that users give: where a program reads and writes, and the lock on the directory it writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError

_HUB_NAME = re.compile(r"(?:([\w-][\w.-]*)/)?([\w-][\w.-]*)/?")


def check_local(key: str, value: str, kind: str) -> None:
    """Refuse what names a place that only other libraries know: a URL, or a model of the Hugging Face Hub.

    A local path that does not exist is left to the program, which knows what should be there.

    Args:
        kind: "model" or "data", which are read, or "output".
    Raises:
        ConfigurationError: beginning with the key of the setting.
    """
    if "://" in value:
        advice = "upload the result afterwards" if kind == "output" else "copy it to this machine first"
        raise ConfigurationError(f"{key} = {value}: only a local path works here; {advice}")
    name = _HUB_NAME.fullmatch(value)
    if kind == "model" and name and not Path(value).exists() and not Path(name[1] or value).exists():
        raise ConfigurationError(
            f"{key} = {value}: no such directory, and models are not downloaded here; for one of the Hugging Face Hub, run "
            f"`hf download {value.rstrip('/')} --local-dir {name[2]}` and give {name[2]}"
        )


@contextlib.contextmanager
def own_directory(directory: Path, lock: str, option: str) -> Iterator[None]:
    """Create `directory` and keep other runs out of it. The lock ends with the process, even with one that is killed.

    Args:
        lock: path of the lock file below the directory; the file names the process that holds it.
        option: by which the user gave the directory.
    Raises:
        ConfigurationError: the directory cannot be created or written to, or another run holds the lock.
    """
    path = directory / lock
    check_directory(directory, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise _cannot_write(directory, option, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigurationError(
                f"{directory}: another run is writing there ({file.read().strip()}); wait for it, or give another {option}"
            ) from error
        except OSError:
            pass  # the file system has no locks: a run without one is better than none
        try:
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise _cannot_write(directory, option, error) from error
        yield


def _cannot_write(directory: Path, option: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{option} {directory}: cannot be written to ({error}); free some space, or give another")


def check_directory(directory: Path, option: str) -> None:
    """Check, without creating anything, that a directory can be created and written to.

    Raises:
        ConfigurationError: naming the option that the user gave it with.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigurationError(f"{option} {directory}: is a file; give a directory")
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigurationError(
            f"{option} {directory}: cannot be written to, {nearest} is a file; give another directory"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{option} {directory}: you may not write to {nearest}; give another directory")
