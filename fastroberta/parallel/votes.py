"""Agreeing to stop: a signal reaches one process, and all must leave the loop after the same step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .processes import Processes


class StopVotes:
    """Whether any process was asked to stop, as all of them learn it after the same step, without waiting for a device.

    Each step sums the number of processes that have a signal along with its other totals. On CUDA the sum is copied to the
    host asynchronously and read one step later, when it has long arrived.

    Args:
        is_asked: whether this process was asked to stop.
    """

    def __init__(self, processes: Processes, is_asked: Callable[[], bool]):
        self._processes, self._is_asked = processes, is_asked
        self._is_cuda = processes.device.type == "cuda"
        self._sums: list[tuple[Tensor, torch.cuda.Event | None]] = []  # on the host, the older of two first

    def cast(self, total: Tensor) -> None:
        """Take note of a step.

        Args:
            total: scalar on the device, the number of processes that had a signal; reduced, so the same everywhere.
        """
        if self._processes.size == 1:
            return  # `agreed` asks this process itself
        if not self._is_cuda:
            self._sums = [(total, None)]
            return
        on_host = torch.empty_like(total, device="cpu", pin_memory=True)
        on_host.copy_(total, non_blocking=True)
        is_copied = torch.cuda.Event()
        is_copied.record()
        self._sums = [*self._sums[-1:], (on_host, is_copied)]

    def agreed(self) -> bool:
        """Whether to stop now. A single process has nobody to agree with, and stops at once."""
        if self._processes.size == 1:
            return self._is_asked()
        if len(self._sums) < (2 if self._is_cuda else 1):
            return False
        total, is_copied = self._sums[0]
        if is_copied is not None:
            is_copied.synchronize()
        return bool(total)
