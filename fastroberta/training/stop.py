"""Stopping in time: a signal ends the run after the step in progress, on all processes after the same step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..parallel.processes import Processes


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered; a second SIGINT acts at once.

    A second SIGTERM does not: schedulers send it to all processes, and torchrun sends it to its own again.

    One process of several that was asked to stop tells the others in the totals that each step sums up anyway.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._number: int | None = None
        self._previous: dict[int, Any] = {}
        self._votes: list[tuple[Tensor, Callable[[], None]]] = []

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self._number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    @property
    def is_noted(self) -> bool:
        """Whether this process was asked to stop."""
        return self._number is not None

    @property
    def cause(self) -> str:
        """The signal's name; another process may have been the one that got it."""
        return "a signal" if self._number is None else signal.Signals(self._number).name

    def send(self, votes: Tensor) -> None:
        """Start to read how many processes were asked to stop when a step was summed up (scalar, on the device)."""
        if self._processes.size == 1:
            return
        if votes.device.type == "cpu":
            self._votes = [(votes, lambda: None)]
            return
        on_host = torch.empty_like(votes, device="cpu", pin_memory=True)
        on_host.copy_(votes, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        # On a GPU the answer is that of the step before, so that the host can prepare the next one meanwhile.
        self._votes = [*self._votes[-1:], (on_host, arrived.synchronize)]

    def is_agreed(self) -> bool:
        """Whether a process was asked to stop, as all of them know it after the same step."""
        if self._processes.size == 1:
            return self.is_noted
        if self._processes.device.type == "cuda" and len(self._votes) < 2:
            return False
        votes, wait = self._votes[0]
        wait()
        return bool(votes)
