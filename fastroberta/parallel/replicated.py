"""`sharding: none`: every process has all gradients, reduced, and takes the same step. Also for a single process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..optim import build_optimizer
from . import traffic
from .processes import Processes
from .reduction import OverlappedReduction
from .state import Piece, gradient_of, load_state, save_state


class ReplicatedOptimizer:
    """A `DistributedOptimizer` that keeps everything in every process."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, processes: Processes):
        parameters = dict(model.named_parameters())
        self._pieces = {name: Piece(one, 0, one.numel(), one.shape) for name, one in parameters.items()}
        self._inner = build_optimizer(parameters, config)
        self._inner.zero_grad()
        self.param_groups = self._inner.param_groups
        self._reduction = None if processes.size == 1 else self._overlap(list(parameters.values()), processes)

    def _overlap(self, parameters: list[nn.Parameter], processes: Processes) -> OverlappedReduction:
        # The update rule chooses the layout of the flat gradient buffer; it is cut into buckets as it lies.
        ranges: list[tuple[int, int]] = []
        buckets: list[list[nn.Parameter]] = []
        for parameter in sorted(parameters, key=lambda one: gradient_of(one).storage_offset()):
            start = int(gradient_of(parameter).storage_offset())
            stop = start + parameter.numel()
            if buckets and 4 * (stop - ranges[-1][0]) <= traffic.BUCKET_BYTES:
                buckets[-1].append(parameter)
                ranges[-1] = (ranges[-1][0], stop)
            else:
                buckets.append([parameter])
                ranges.append((start, stop))
        # The backward starts at the end of the model: the bucket whose earliest parameter comes last is ready first.
        order = {parameter: index for index, parameter in enumerate(parameters)}
        indices = sorted(range(len(buckets)), key=lambda i: -min(order[parameter] for parameter in buckets[i]))

        def send(index: int) -> Any:
            start, stop = ranges[indices[index]]
            return dist.all_reduce(self._inner.gradient[start:stop], async_op=True)

        return OverlappedReduction([buckets[i] for i in indices], send, processes.note_reduction)

    @property
    def last_grad_norm(self) -> Tensor:
        return self._inner.last_grad_norm

    @property
    def gradient(self) -> Tensor:
        """fp32 (n,), all gradients."""
        return self._inner.gradient

    def list_updated(self) -> list[Tensor]:
        """The tensors that a step changes, not copies of them. After the first step, when the optimizer has its state."""
        states = [tensor for state in self._inner.state.values() for tensor in state.values()]
        scalars = [
            getattr(self._inner, name) for name in ("last_grad_norm", "num_skipped") if hasattr(self._inner, name)
        ]
        return [*self.weights().values(), self.gradient, *states, *scalars]

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    def last_backward(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._reduction is None else self._reduction.run()

    def step(self, *, grad_scale: Tensor) -> None:
        self._inner.step(grad_scale=grad_scale)

    def weights(self) -> dict[str, Tensor]:
        return {name: piece.parameter.detach() for name, piece in self._pieces.items()}

    def tensors(self) -> dict[str, Tensor]:
        return save_state(self._inner, self._pieces, lambda pieces: pieces)

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        load_state(self._inner, self._pieces, tensors, where)
