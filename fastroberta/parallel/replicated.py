"""The optimizer of a run of several processes: what each of them keeps, and what they send each other.

Per step, for n parameters and N processes, each process sends (N - 1) / N of this many bytes, as the best algorithms need:

    sharding    kept by each (fp32)              reduced                      gathered
    none        weights, gradients, moments      8 n, all-reduce              -
    optimizer   weights, gradients; 1/N of the   4 n, reduce-scatter (gloo's  2 n, or 4 n in fp32
                moments and of a master copy     is an all-reduce: 8 n)
    full        1/N of everything                4 n a micro-batch            4 n a micro-batch, and 4 n more of layers

`none` and `optimizer` reduce gradients once a step, while the backward of the last micro-batch still runs: a bucket of
parameters leaves as soon as all its gradients are there. `full` is PyTorch's FSDP2 (`fully_shard`), for models that one
device cannot hold: weights come when a layer needs them and go again. `optimizer` is stage 1 and `full` stage 3 of ZeRO
(Rajbhandari et al., arXiv 1910.02054).

What they compute is the same. In half precision, `optimizer` gathers matrices in 16 bits, which is what products round
them to in any case; only the embedding's sum sees the rounding. Masters and checkpoints are fp32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..errors import CheckpointError
from ..optim import build_optimizer
from .processes import Processes
from .traffic import BUCKET_BYTES


class Piece(NamedTuple):
    """What this process updates of one parameter: its elements [start, stop), counted in the flattened tensor."""

    parameter: nn.Parameter  # what the optimizer sees; fp32
    start: int
    stop: int


class ReplicatedOptimizer:
    """`sharding: none`: every process has all gradients, reduced, and takes the same step. Also that of a single process.

    Attributes:
        inner: the update rule, over this process's pieces. pieces: of every parameter, by name.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, processes: Processes):
        self.processes = processes
        named = dict(model.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in named.items()}
        self.pieces = self._cut(named)
        self.inner = build_optimizer(
            {name: piece.parameter for name, piece in self.pieces.items()},
            config,
            processes.add_up if self._is_sharded else None,
        )
        self.inner.zero_grad()
        self._prepare_reduction(named)

    _is_sharded = False

    def _cut(self, named: dict[str, nn.Parameter]) -> dict[str, Piece]:
        return {name: Piece(parameter, 0, parameter.numel()) for name, parameter in named.items()}

    def _prepare_reduction(self, named: dict[str, nn.Parameter]) -> None:
        if self.processes.size == 1:
            return
        order = {parameter: index for index, parameter in enumerate(named.values())}
        ranges: list[tuple[int, int]] = []
        buckets: list[list[nn.Parameter]] = []
        # The flat buffer in bucketfuls, in whatever order the update rule laid it out.
        for parameter in sorted(order, key=lambda one: _grad(one).storage_offset()):
            start = int(_grad(parameter).storage_offset())
            stop = start + parameter.numel()
            if buckets and 4 * (stop - ranges[-1][0]) <= BUCKET_BYTES:
                buckets[-1].append(parameter)
                ranges[-1] = (ranges[-1][0], stop)
            else:
                buckets.append([parameter])
                ranges.append((start, stop))
        # The backward goes through the model from its end: first the bucket whose earliest parameter is the latest.
        indices = sorted(range(len(buckets)), key=lambda i: -min(order[parameter] for parameter in buckets[i]))

        def send(index: int) -> Any:
            start, stop = ranges[indices[index]]
            return dist.all_reduce(self.inner.gradient[start:stop], async_op=True)

        self._reduction = OverlappedReduction([buckets[i] for i in indices], send, self._note_waiting)

    def _note_waiting(self) -> None:
        self.processes.note_progress("the reduction of gradients")

    # One step

    @property
    def last_grad_norm(self) -> Tensor:
        return self.inner.last_grad_norm

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    @contextlib.contextmanager
    def last_backward(self) -> Iterator[None]:
        """Around the backward of a step's last micro-batch: gradients leave as they become ready, and are reduced after."""
        if self.processes.size == 1:
            yield
        else:
            with self._reduction.run():
                yield

    def step(self, *, grad_scale: Tensor) -> None:
        """Update the weights by the gradients divided by `grad_scale`; without effect where these are not finite."""
        self.inner.step(grad_scale=grad_scale)

    # State, whole, whatever the sharding: a checkpoint does not depend on it. All processes call these together.

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights by name; of use in the first process only."""
        return self._gather({name: piece.parameter.detach() for name, piece in self.pieces.items()})

    def tensors(self) -> dict[str, Tensor]:
        """`exp_avg`, `exp_avg_sq` and `step` of every parameter, named `<kind>.<parameter>`; for the first process only."""
        states = {name: self.inner.state[piece.parameter] for name, piece in self.pieces.items()}
        found = {f"step.{name}": torch.as_tensor(state["step"]) for name, state in states.items()}
        for kind in ("exp_avg", "exp_avg_sq"):
            whole = self._gather({name: state[kind] for name, state in states.items()})
            found |= {f"{kind}.{name}": tensor for name, tensor in whole.items()}
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        """The inverse of `tensors`.

        Raises:
            CheckpointError: state of a parameter is missing or has another shape; `where` says in which checkpoint.
        """
        for name, piece in self.pieces.items():
            state, shape = self.inner.state[piece.parameter], self.shapes[name]
            for kind, expected in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape)):
                saved = tensors.get(f"{kind}.{name}")
                if saved is None or saved.shape != expected:
                    raise CheckpointError(
                        f"{where}: optimizer state {kind}.{name} is missing or has another shape; continue from another "
                        "checkpoint"
                    )
                if kind != "step":
                    saved = saved.flatten()[piece.start : piece.stop].view(piece.parameter.shape)
                if kind in state:  # FusedLAMB's state are views of its buffers
                    state[kind].copy_(saved)
                else:
                    state[kind] = saved.to(piece.parameter.device, copy=True)

    def _gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        return pieces


class OverlappedReduction:
    """Communication that starts inside a backward: bucket i is sent when its gradients, and buckets before it, are ready.

    All processes send in the same order, whatever the order in which gradients become ready.

    Args:
        buckets: parameters. send: starts to reduce the bucket of a number, and returns the work to wait for.
        before_waiting: called when all is sent.
    """

    def __init__(
        self, buckets: list[list[nn.Parameter]], send: Callable[[int], Any], before_waiting: Callable[[], None]
    ):
        self._before_waiting = before_waiting
        self._sizes = [len(bucket) for bucket in buckets]
        self._send = send
        self._is_on = False
        self._missing: list[int] = []
        self._works: list[Any] = []
        for index, bucket in enumerate(buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._note_ready, index))

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Around one backward; afterwards everything is reduced.

        Also where memory ran out in it: the others wait for all buckets, whatever is in them.
        """
        self._missing, self._works = list(self._sizes), []
        self._is_on = True
        try:
            yield
        except torch.OutOfMemoryError:
            self._is_on = False
            self._finish()
            raise
        finally:
            self._is_on = False
        self._finish()

    def _finish(self) -> None:
        while len(self._works) < len(self._sizes):  # parameters that got no gradient are waited for no longer
            self._works.append(self._send(len(self._works)))
        self._before_waiting()
        for work in self._works:
            work.wait()

    def _note_ready(self, index: int, _: Tensor) -> None:
        if not self._is_on:
            return
        self._missing[index] -= 1
        while len(self._works) < len(self._sizes) and not self._missing[len(self._works)]:
            self._works.append(self._send(len(self._works)))


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
