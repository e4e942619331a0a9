"""Candidates for tiles that only a GPU can decide between.

Chosen without one, by the machine code for sm_90: registers without a spill, and the fewest issue slots of the inner
loop (bench/LOG.md, section 8).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sweep:
    """One entry of a kernel module's table, and what it could be.

    Attributes:
        operation: file of the operation in this folder, whose case is run.
        table: name of the dictionary in the kernel module of the same name, or of a function that chooses.
        key: of the entry. The keys of a table that has entries for several chips may begin with the chip.
        part: which part decides: 0 forward, 1 backward.
        dropout, layout: of the setting that is run.
    """

    operation: str
    table: str
    key: Any
    candidates: tuple[Any, ...]
    part: int
    dropout: float = 0.0
    layout: str = "full"

    def __str__(self) -> str:
        part = ("forward", "backward")[self.part]
        return f"{self.operation} {part}, {self.layout}, {self.table}[{self.key}], dropout {self.dropout}"

    @contextlib.contextmanager
    def keep_tables(self) -> Iterator[None]:
        """Inside the context the entry may be set. Afterwards it is what it was, so the next sweep varies nothing else."""
        members = vars(importlib.import_module(f"fastroberta_kernels.{self.operation}"))
        before = {name: members[name] for name in (self.table, f"CHIP_{self.table}") if name in members}
        members.update(copy.deepcopy(before))
        try:
            yield
        finally:
            members.update(before)

    def choose(self, candidate: Any) -> None:
        """Set the entry in this process. Raises LookupError where the module has none."""
        module = importlib.import_module(f"fastroberta_kernels.{self.operation}")
        if callable(getattr(module, self.table)):
            setattr(module, self.table, lambda *_: candidate)
            return
        # Exceptions by chip come before the table, so they are set as well: else the sweep would vary nothing there.
        tables = [getattr(module, self.table), getattr(module, f"CHIP_{self.table}", {})]
        if not sum(replace_entries(table, self.key, candidate) for table in tables):
            raise LookupError(f"fastroberta_kernels.{self.operation}.{self.table} has no entry {self.key}")


def replace_entries(table: dict[Any, Any], key: Any, value: Any) -> int:
    """Set the entries whose key is `key`, or a tuple that ends with it; returns how many there are."""
    count = 0
    for name, old in table.items():
        if isinstance(old, dict):
            count += replace_entries(old, key, value)
        elif name == key or (isinstance(name, tuple) and isinstance(key, tuple) and name[-len(key) :] == key):
            table[name] = value
            count += 1
    return count


# BLOCK_M (queries), BLOCK_N (keys), num_warps, num_stages; bf16 and heads of 64.
FORWARD = ((128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 32, 4, 3))
BACKWARD = ((16, 128, 8, 2), (64, 128, 8, 1), (32, 128, 8, 1), (64, 64, 4, 1), (64, 64, 8, 1), (128, 64, 8, 1))
WINDOW_FORWARD = ((64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2))
# By the time of a step that is at stake.
SWEEPS = (
    Sweep("attention", "BACKWARD_BLOCKS", (2, 64), BACKWARD, 1, 0.1),
    Sweep("attention", "FORWARD_BLOCKS", (2, 64), FORWARD, 0, 0.1),
    Sweep("gelu", "FORWARD_TILE", "ROWS", (16, 8, 4), 0),
    Sweep("gelu", "TILE", "ROWS", (8, 16, 4), 1),
    # Elements of a tile: twice as many need 13% fewer issue slots, and more registers.
    Sweep("layer_norm", "ELEMENTS", "forward", (2048, 4096, 1024), 0, 0.1),
    # Tiles that are fetched ahead, and the most registers of a thread; rows of 768 take blocks of 1024 columns.
    Sweep(
        "layer_norm", "BACKWARD_STAGES_AND_REGISTERS", 1024, ((3, 128), (2, 128), (1, 128), (2, None), (4, 128)), 1, 0.1
    ),
    Sweep("attention", "BACKWARD_BLOCKS", (2, 64), BACKWARD, 1),
    Sweep("attention", "FORWARD_BLOCKS", (2, 64), FORWARD, 0),
    Sweep("gelu", "TILE", "BLOCK", (256, 512, 1024), 1),
    Sweep("cross_entropy", "_chunk_rows", None, (1024, 2048, 4096, 512), 0),  # rows of logits that exist at a time
    Sweep("attention", "CHIP_WINDOW_FORWARD_BLOCKS", (90, 2, 64), WINDOW_FORWARD, 0, 0.1, "window"),
)
