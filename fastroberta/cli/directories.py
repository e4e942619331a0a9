"""The directory that a program writes to: created if missing, and locked against a second run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError


@contextlib.contextmanager
def own_directory(directory: Path, lock: str, option: str) -> Iterator[None]:
    """Create `directory` and keep a second run out of it. The lock ends with the process, even if that is killed.

    Args:
        lock: path of the lock file in the directory; it names the process that holds it.
        option: how the user named the directory.
    Raises:
        ConfigurationError: it cannot be created or written to, or another run holds the lock.
    """
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
            pass  # the file system has no locks: better to run without than not at all
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
        raise ConfigurationError(
            f"{option} {directory}: cannot be written to, {nearest} is read-only for you; give another"
        )
