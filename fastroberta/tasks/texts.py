"""Texts from the command line, from files, or from standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError, DataError


def read_texts(texts: Sequence[str], file: str | None) -> list[str]:
    """The given texts and the lines of a file; without either, the lines of standard input. Blank lines are left out, and
    a line on stderr says how many.

    Raises:
        DataError: the file cannot be read. ConfigurationError: there is no text.
    """
    found = list(texts)
    if file is not None and file != "-":
        try:
            found += _split_lines(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise DataError(f"{file}: cannot be read ({reason}); give a text file with one text per line") from error
    elif file == "-" or not found:
        found += _split_lines(sys.stdin.read())
    kept = [text for text in found if text.strip()]
    if not kept:
        raise ConfigurationError("texts: there are none; give a text, --file FILE, or text on standard input")
    if blank := len(found) - len(kept):  # line n is then not text n
        print(f"{blank:,} blank lines are left out", file=sys.stderr)
    return kept


def _split_lines(text: str) -> list[str]:
    # Not splitlines(): a text may hold a form feed or a Unicode line separator.
    return text.removesuffix("\n").split("\n")
