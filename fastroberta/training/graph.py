"""Micro-batches and updates as CUDA graphs: recorded once, then replayed without Python.

What changes from step to step therefore lives on the device, in tensors that stay where they are: the batch, the learning
rate, the expected number of masked tokens and the loss scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..data import Batch

EAGER_CALLS = 3  # until kernels are compiled, libraries are loaded, and the optimizer has its state


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record what `work` launches on the current device, without running it. Returns a function that runs it."""
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the stream where a capture fails, which PyTorch's own leaves undone. Only this thread is
    # held to the rules of a capture: another one is sending the next batch to the device.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class Replayed:
    """A function that runs as it is for a few calls, and is then recorded and replayed.

    A batch of other shapes is recorded again. If recording fails, the function goes on running as it is.

    Args:
        function: leaves its results in tensors that stay where they are, and returns nothing.
        explain: called with the reason, in one line, if recording fails.
        record: see `record_cuda_graph`.
    """

    def __init__(
        self,
        function: Callable[..., None],
        explain: Callable[[str], None],
        record: Callable[[Callable[[], None]], Callable[[], None]] = record_cuda_graph,
    ):
        self._function, self._explain = function, explain
        self._record: Callable[[Callable[[], None]], Callable[[], None]] | None = record
        self._calls = 0
        self._shapes: list[torch.Size] = []
        self._batches: list[Batch] = []
        self._replay: Callable[[], None] | None = None

    def __call__(self, *batches: Batch) -> None:
        shapes = [tensor.shape for batch in batches for tensor in _list_tensors(batch).values()]
        if shapes != self._shapes:
            self._calls, self._shapes, self._batches, self._replay = 0, shapes, [], None
        self._calls += 1
        if self._record is None or self._calls <= EAGER_CALLS:
            return self._function(*batches)
        if self._replay is None:
            self._batches = [_clone(batch) for batch in batches]
            try:
                self._replay = self._record(lambda: self._function(*self._batches))
            except Exception as error:  # whatever CUDA or a library objects to; nothing has run yet
                self._record, self._batches = None, []
                self._explain(_describe(error))
                return self._function(*batches)
        for batch, static in zip(batches, self._batches):
            for name, tensor in _list_tensors(batch).items():
                getattr(static, name).copy_(tensor)
        self._replay()


def _describe(error: BaseException) -> str:
    """The first cause in a line. Errors that follow it only say that the capture is invalid."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _list_tensors(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def _clone(batch: Batch) -> Batch:
    return dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in _list_tensors(batch).items()})


def keep_on_device(param_groups: Iterable[dict[str, Any]], device: torch.device) -> None:
    """Let an optimizer's step be recorded: each group's learning rate becomes a tensor on the device."""
    for group in param_groups:
        group["lr"] = torch.tensor(group["lr"], device=device)
        if "capturable" in group:
            group["capturable"] = True


def set_learning_rate(param_groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Set the learning rate of the next update, wherever a group keeps it."""
    for group in param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
