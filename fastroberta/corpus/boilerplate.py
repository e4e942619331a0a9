"""Lines that recur across documents: menus, notices and the like.

As in CCNet (Wenzek et al., arXiv 1911.00359, section 3.1) the unit is a line, its white space at both ends aside. Lines
of fewer than three words ("}", "* * *", "Yes.") are left alone. A first pass over the whole corpus writes a pair of
hashes, of the line and of its document, for each line; equal documents count as one, so that copies of a document are
no boilerplate. The result depends on the text alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

MIN_WORDS = 3
_PAIRS_AT_ONCE = 4 << 20  # sorted in memory
_PAIRS_A_READ = 1 << 16


def write_line_hashes(documents: Iterable[str], table: Path) -> int:
    """Write uint64 pairs (line, document) of all documents; returns their number. 16 bytes a line on the disk."""
    count = 0
    with open(table, "wb") as file:
        for text in documents:
            document = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
            lines = {key for line in text.split("\n") if (key := _hash_line(line)) is not None}
            pairs = np.full((len(lines), 2), document, dtype=np.uint64)
            pairs[:, 0] = list(lines)
            file.write(pairs.tobytes())
            count += len(lines)
    return count


def find_recurring(table: Path, count: int, minimum: int) -> np.ndarray:
    """Hashes of the lines that at least `minimum` different documents hold: uint64, sorted.

    The keys are sorted a part at a time; memory grows with the lines found only.
    """
    found = [np.zeros(0, dtype=np.uint64)]
    parts = np.uint64(max(1, -(-count // _PAIRS_AT_ONCE)))
    for part in range(int(parts)):
        chosen = []
        for start in range(0, count, _PAIRS_A_READ):
            pairs = np.fromfile(table, np.uint64, 2 * min(_PAIRS_A_READ, count - start), offset=16 * start).reshape(
                -1, 2
            )
            chosen.append(pairs[pairs[:, 0] % parts == np.uint64(part)])
        if not chosen:
            break
        pairs = np.concatenate(chosen)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        is_new = np.ones(len(pairs), dtype=bool)
        is_new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
        lines, documents = np.unique(pairs[is_new, 0], return_counts=True)
        found.append(lines[documents >= minimum])
    return np.sort(np.concatenate(found))


def remove_lines(text: str, recurring: np.ndarray) -> tuple[str, list[str]]:
    """The text without its recurring lines, and those lines. Two blank lines that meet become one."""
    if not len(recurring):
        return text, []
    lines = text.split("\n")
    hashes = [_hash_line(line) for line in lines]
    keys = np.array([key or 0 for key in hashes], dtype=np.uint64)
    places = np.minimum(np.searchsorted(recurring, keys), len(recurring) - 1)
    is_recurring = (recurring[places] == keys) & np.array([key is not None for key in hashes])
    if not is_recurring.any():
        return text, []
    kept: list[str] = []
    removed: list[str] = []
    closes_gap = False
    for line, goes in zip(lines, is_recurring.tolist()):
        is_blank = not line or line.isspace()
        if goes:
            removed.append(line.strip())
            closes_gap = True
        elif not (closes_gap and is_blank and (not kept or not kept[-1] or kept[-1].isspace())):
            kept.append(line)
            closes_gap = False
    return "\n".join(kept), removed


def _hash_line(line: str) -> int | None:
    """None for a line of fewer than MIN_WORDS words."""
    if len(line.split(None, MIN_WORDS - 1)) < MIN_WORDS:
        return None
    return int.from_bytes(hashlib.blake2b(line.strip().encode(), digest_size=8).digest(), "little")
