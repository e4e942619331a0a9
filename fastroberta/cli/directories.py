"""A directory that a program writes into: made where it is missing, and the program's alone while it runs."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError


@contextlib.contextmanager
def own_directory(directory: Path, lock: str, option: str) -> Iterator[None]:
    """Make `directory`, and keep a second run out of it; the system takes the lock from a process that is killed.

    Args:
        lock: the file in it that is locked. option: how the user named the directory.
    Raises:
        ConfigurationError: it cannot be made or written to, or another run has it.
    """
    import fcntl

    path = directory / lock
    check_directory(directory, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ConfigurationError(
            f"{option} {directory}: cannot be written to ({error}); give another directory"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigurationError(
                f"{directory}: another run writes there ({file.read().strip()}); wait for it, or give another {option}"
            ) from error
        except OSError:
            pass  # a file system without locks: a run without one is better than none
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_directory(directory: Path, option: str) -> None:
    """Refuse, without making or writing anything, a directory that could not be made or written to.

    Raises:
        ConfigurationError: naming the option by which the user gave it.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigurationError(f"{option} {directory}: is a file; give a directory")
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigurationError(
            f"{option} {directory}: cannot be written to, {nearest} is a file; give another directory"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{option} {directory}: cannot be written to, {nearest} does not let you; give another"
        )
