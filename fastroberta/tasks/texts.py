"""Texts from the command line, from files, or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError, DataError


def read_texts(texts: Sequence[str], file: str | None) -> list[str]:
    """The given texts and the lines of a file; without either, the lines of standard input. Blank lines are dropped.

    Raises:
        DataError: the file cannot be read. ConfigurationError: there is no text.
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
