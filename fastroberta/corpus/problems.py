"""What is wrong with the input: damage stops the program or is left out; what loses nothing is repaired. All is counted."""

from __future__ import annotations

from collections import Counter

from ..errors import DataError

# Kinds that are repaired without asking: the text means the same without them.
REPAIRED = ("UTF-16 or UTF-32 text", "byte order mark", "carriage return", "NUL character")


class Problems:
    """Counts of faults by kind; with the policy "error" the first one that cannot be repaired is raised."""

    def __init__(self, policy: str):
        self.refuse = policy == "error"
        self.counts: Counter[str] = Counter()

    def repair(self, kind: str, count: int = 1) -> None:
        """Count what the caller repairs; `kind` is one of REPAIRED."""
        self.counts[kind] += count

    def report(self, kind: str, where: str, advice: str) -> None:
        """Raise DataError, or count and return: the caller then leaves out what is damaged."""
        if self.refuse:
            raise DataError(f"{where}: {kind}; {advice}, or leave out such input with --on-bad-input skip")
        self.counts[kind] += 1
