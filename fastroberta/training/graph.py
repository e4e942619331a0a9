"""Micro-batches and updates as CUDA graphs: recorded and checked once, then replayed without Python.

A graph repeats the same kernels on the same memory. What changes from step to step therefore lives on the device, in
tensors that stay where they are: the batch, the learning rate, the expected number of masked tokens and the loss scale.

No graph is trusted unseen. The call that records it runs twice from the same state, once eagerly and once as a replay, and
both results must agree to the bit. They can, because both launch the same kernels in the same order, and PyTorch gives
cuBLAS a workspace of the same size on every stream. They must, because a resumed run takes its first steps eagerly and
still has to end where an uninterrupted one does. During the recording all inputs hold other values, so one that was
recorded by value, which would be stale in the next step, shows up at once.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ..config import TrainConfig
from ..data import Batch
from ..parallel.distribute import DistributedOptimizer
from ..parallel.processes import Processes
from ..parallel.replicated import ReplicatedOptimizer

# Kernels are compiled, libraries loaded and the optimizer's state made in the first call. The next one is recorded, after
# it has run eagerly for the check.
EAGER_CALLS = 1
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record what `work` launches on the current device, without running it. Returns a function that runs it."""
    # Garbage may hold CUDA memory, which must not be freed during a capture, or nodes of autograd that would accumulate
    # gradients on the stream of an earlier step.
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the stream if the capture fails, which PyTorch's own does not. Only this thread has to obey
    # the rules of a capture: another one is sending the next batch to the device. What autograd's thread launches is
    # captured all the same, because it launches on this stream.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class Replayed:
    """A function that runs eagerly at first, and is then recorded, checked and replayed.

    A batch of other shapes starts over. If the recording or the check fails, the function stays eager.

    Args:
        function: leaves its results in tensors that stay where they are, and returns nothing.
        name: of what the function does, for messages and profiles.
        explain: called with one line if the function stays eager.
        reads: the tensors, besides the batch, whose values change between calls; of floating-point numbers.
        writes: returns all tensors that a call changes. While a graph is checked, there is a copy of them.
        after: is recorded first.
        record: see `record_cuda_graph`.

    Attributes:
        has_given_up: the function stays eager.
    """

    def __init__(
        self,
        function: Callable[..., None],
        name: str,
        *,
        explain: Callable[[str], None],
        reads: Sequence[Tensor],
        writes: Callable[[], list[Tensor]],
        after: Replayed | None = None,
        record: Callable[[Callable[[], None]], Callable[[], None]] = record_cuda_graph,
    ):
        self._function, self._name, self._explain = function, name, explain
        self._reads, self._writes, self._after, self._record = reads, writes, after, record
        self._shapes: list[dict[str, torch.Size]] | None = None
        self.forget()

    def forget(self) -> None:
        """Free the memory of the graph, and start over."""
        self._calls = 0
        self._batches: list[Batch] = []  # what a graph reads; before there is one, the batch of the call before
        self._replay: Callable[[], None] | None = None
        self.has_given_up = False

    @property
    def is_recorded(self) -> bool:
        """Whether the next call is a replay, unless its batch has other shapes."""
        return self._replay is not None

    def __call__(self, *batches: Batch) -> None:
        shapes = [{name: tensor.shape for name, tensor in _list_tensors(batch).items()} for batch in batches]
        if shapes != self._shapes:
            self.forget()
            self._shapes = shapes
        is_waiting = self._after is not None and not (self._after.is_recorded or self._after.has_given_up)
        if self.is_recorded:
            self._run_replay(batches)
        elif self.has_given_up:
            self._function(*batches)
        elif is_waiting or self._calls < EAGER_CALLS:
            self._calls += 1
            self._batches = [_clone(batch) for batch in batches]
            self._function(*batches)
        else:
            self._record_and_check(batches)

    def _run_replay(self, batches: Sequence[Batch]) -> None:
        assert self._replay is not None
        with record_function(self._name):
            for batch, static in zip(batches, self._batches):
                for name, tensor in _list_tensors(batch).items():
                    getattr(static, name).copy_(tensor)
            self._replay()

    @torch.no_grad()
    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for source, target in zip(sources, targets):
            target.copy_(source)

    def _record_and_check(self, batches: Sequence[Batch]) -> None:
        writes = self._writes()
        before: list[Tensor] = []
        expected: list[int] = []
        replayed: list[float] = []
        try:
            before = [tensor.clone() for tensor in writes]
            self._function(*batches)
            expected = _sum_bits(writes)
            self._copy(before, writes)
            self._replay = self._record_with_other_inputs()
            self._run_replay(batches)
            if _sum_bits(writes) == expected:
                return
            replayed = _measure_norms(writes)
        except Exception as error:  # whatever CUDA or a library objects to, and too little memory
            reason = _describe(error)
        # Not in the except block: its error holds the tensors of a failed recording, and the eager call needs the memory.
        self.forget()
        self.has_given_up = True
        self._copy(before, writes)  # nothing, if there was no memory for a copy
        del before
        self._function(*batches)
        if replayed:
            reason = f"a replay differs from the eager run, in norm by up to {_compare(replayed, writes):.0e}"
            if _sum_bits(writes) != expected:
                reason += ", but two eager runs differ too"
        self._explain(f"{self._name} go on without a CUDA graph: {reason}")

    def _record_with_other_inputs(self) -> Callable[[], None]:
        values = [tensor.clone() for tensor in self._reads]
        try:
            for tensor in self._reads:
                tensor.fill_(torch.nan)
            return self._record(lambda: self._function(*self._batches))
        finally:
            self._copy(values, self._reads)


def choose_graphs(config: TrainConfig, processes: Processes) -> tuple[bool, str]:
    """Whether the steps of a run are to be replayed, and a line that says why not where one might expect it."""
    if not config.cuda_graph or config.dry_run or processes.device.type != "cuda":
        return False, ""  # a dry run would spend its two steps recording
    if processes.size > 1 or config.cpu_offload:
        # It is not certain that NCCL's reductions inside a backward can be recorded; offloaded updates are not CUDA's.
        return False, "cuda_graph: not used with several processes or with cpu_offload"
    return True, ""


def make_graphs(
    add_gradients: Callable[[Batch], None],
    update: Callable[[], None],
    optimizer: DistributedOptimizer,
    totals: Tensor,
    *,
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    **options: Any,
) -> tuple[Replayed, Replayed]:
    """A micro-batch and an update of a single process as CUDA graphs, which are recorded within the first steps.

    Args:
        add_gradients: changes the gradients and `totals`. update: reads those, changes the optimizer and `state`.
        inputs: what both read and each step sets anew.
        options: of `Replayed`.
    """
    assert isinstance(optimizer, ReplicatedOptimizer)
    rates = keep_on_device(optimizer.param_groups, totals.device)
    updates = Replayed(
        update,
        "updates",
        reads=[*rates, *inputs, totals],
        writes=lambda: [*optimizer.list_updated(), *state],
        **options,
    )
    # After the updates: copies of the optimizer's state find room before a graph keeps the activations' memory.
    micro_batches = Replayed(
        add_gradients,
        "micro-batches",
        reads=inputs,
        writes=lambda: [optimizer.gradient, totals],
        after=updates,
        **options,
    )
    return micro_batches, updates


def make_room(work: Callable[[], Any], graphs: Sequence[Replayed]) -> Any:
    """The result of `work`. If it runs out of memory, graphs give up theirs, and it is done again."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if not any(graph.is_recorded for graph in graphs):
            raise
    for graph in graphs:
        graph.forget()
    return work()


def _sum_bits(tensors: Sequence[Tensor]) -> list[int]:
    """A checksum of each tensor: it changes if any element does, and needs no memory. Waits for the device."""
    return torch.stack(
        [tensor.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    ).tolist()


def _measure_norms(tensors: Sequence[Tensor]) -> list[float]:
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    return torch.stack([torch.linalg.vector_norm(tensor).double() for tensor in numbers]).tolist()


def _compare(norms: Sequence[float], tensors: Sequence[Tensor]) -> float:
    """The largest relative difference between norms and those of tensors: tiny where only rounding differs."""
    pairs = [(one, other) for one, other in zip(norms, _measure_norms(tensors)) if one != other]
    if not all(math.isfinite(one - other) for one, other in pairs):
        return math.inf
    return max((abs(one - other) / max(abs(one), abs(other)) for one, other in pairs), default=0.0)


def _describe(error: BaseException) -> str:
    """The first cause in a line. Errors that follow it only say that the capture is invalid."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _list_tensors(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def _clone(batch: Batch) -> Batch:
    return dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in _list_tensors(batch).items()})


def keep_on_device(param_groups: Iterable[dict[str, Any]], device: torch.device) -> list[Tensor]:
    """Let an optimizer's step be recorded: each group's learning rate becomes a tensor on the device.

    Returns:
        the learning rates.
    """
    for group in param_groups:
        group["lr"] = torch.tensor(group["lr"], device=device)
    return [group["lr"] for group in param_groups]


def set_learning_rate(param_groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Set the learning rate of the next update, wherever a group keeps it."""
    for group in param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
