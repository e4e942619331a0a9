"""`sharding: optimizer`: each process keeps part of the moments and of an fp32 master copy, and updates that part."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..optim import build_optimizer, round_up
from . import traffic
from .processes import Processes
from .reduction import OverlappedReduction
from .state import Piece, gradient_of, load_state, save_state

ALIGNMENT = 64  # elements: tensors begin at a cache line in 16-bit buffers too

# PyTorch 2.13 renamed them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclasses.dataclass
class Bucket:
    """Elements [start, stop) of the flat buffers; each process updates an equal share of them."""

    is_vector: bool
    start: int
    stop: int
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)  # where each parameter begins in the flat buffers


def lay_out(shapes: Mapping[str, torch.Size], num_processes: int) -> list[Bucket]:
    """Distribute parameters over buckets, in the order in which the backward completes their gradients."""
    buckets: list[Bucket] = []
    end = 0
    # Vectors share one bucket, the last: they are small, and those of the embedding are ready last.
    for is_vector in (False, True):
        is_first = True
        for name in reversed([name for name, shape in shapes.items() if (len(shape) < 2) == is_vector]):
            size = round_up(shapes[name].numel(), ALIGNMENT)
            if is_first or (not is_vector and 4 * (end + size - buckets[-1].start) > traffic.BUCKET_BYTES):
                end = round_up(end, ALIGNMENT * num_processes)
                buckets.append(Bucket(is_vector, end, end))
                is_first = False
            buckets[-1].offsets[name] = end
            end += size
            buckets[-1].stop = end
    for bucket in buckets:
        bucket.stop = bucket.start + round_up(bucket.stop - bucket.start, ALIGNMENT * num_processes)
    return buckets


class ShardedOptimizer:
    """A `DistributedOptimizer` in which each process receives and updates its share of every bucket.

    Args:
        gather_dtype: in which updated matrices travel; vectors (biases, LayerNorm) travel in fp32.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, config: OptimizerConfig, processes: Processes, gather_dtype: torch.dtype = torch.float32
    ):
        self._processes, self._gather_dtype = processes, gather_dtype
        parameters = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._buckets = lay_out(self._shapes, processes.size)
        self._weight, self._gradient = (torch.zeros(self._buckets[-1].stop, device=processes.device) for _ in range(2))
        pieces = {}
        for bucket in self._buckets:
            first, last = self._share(bucket)
            for name, offset in bucket.offsets.items():
                parameter = parameters[name]
                weight, parameter.grad = (self._view(buffer, name, offset) for buffer in (self._weight, self._gradient))
                parameter.data = weight.copy_(parameter)
                start, stop = (min(max(bound - offset, 0), parameter.numel()) for bound in (first, last))
                own = nn.Parameter(weight.flatten()[start:stop].clone())
                pieces[name] = Piece(own, start, stop, parameter.shape)
        self._pieces = {name: pieces[name] for name in parameters}
        own_parameters = {name: piece.parameter for name, piece in self._pieces.items()}
        self._inner = build_optimizer(own_parameters, config, processes.add_up)
        self._inner.zero_grad()
        self.param_groups = self._inner.param_groups
        self._reduced = [torch.zeros(self._share_size(bucket), device=processes.device) for bucket in self._buckets]
        self._reduction = OverlappedReduction(
            [[parameters[name] for name in bucket.offsets] for bucket in self._buckets],
            self._send,
            processes.note_reduction,
        )
        self._spread_weights()

    def _share_size(self, bucket: Bucket) -> int:
        return (bucket.stop - bucket.start) // self._processes.size

    def _share(self, bucket: Bucket) -> tuple[int, int]:
        """The elements of the flat buffers that this process updates in a bucket: first, and one past the last."""
        first = bucket.start + self._processes.rank * self._share_size(bucket)
        return first, first + self._share_size(bucket)

    def _view(self, buffer: Tensor, name: str, offset: int) -> Tensor:
        return buffer[offset : offset + self._shapes[name].numel()].view(self._shapes[name])

    def _send(self, index: int) -> Any:
        bucket = self._buckets[index]
        return _reduce_scatter(self._reduced[index], self._gradient[bucket.start : bucket.stop], async_op=True)

    @property
    def last_grad_norm(self) -> Tensor:
        return self._inner.last_grad_norm

    def zero_grad(self) -> None:
        self._gradient.zero_()

    def last_backward(self) -> contextlib.AbstractContextManager[None]:
        return self._reduction.run()

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor) -> None:
        pieces = [self._pieces[name] for bucket in self._buckets for name in bucket.offsets]
        reduced = [part for one in zip(self._reduced, self._buckets) for part in self._split(*one)]
        torch._foreach_copy_([gradient_of(piece.parameter) for piece in pieces], reduced)
        self._inner.step(grad_scale=grad_scale)
        self._spread_weights()

    def _split(self, share: Tensor, bucket: Bucket) -> list[Tensor]:
        """The pieces of a bucket's parameters, as views of this process's share of it."""
        first, _ = self._share(bucket)
        parts = []
        for name, offset in bucket.offsets.items():
            piece = self._pieces[name]
            begin = max(offset + piece.start - first, 0)
            parts.append(share[begin : begin + piece.stop - piece.start])
        return parts

    @torch.no_grad()
    def _spread_weights(self) -> None:
        """Copy the pieces that each process has updated into the weights of all."""
        pieces: dict[str, Tensor] = {name: piece.parameter for name, piece in self._pieces.items()}
        self._gather_buckets(pieces, self._weight, self._gather_dtype)

    def _gather_buckets(self, pieces: dict[str, Tensor], target: Tensor, matrix_dtype: torch.dtype) -> None:
        """Collect pieces from all processes in `target`, which has the layout of the flat buffers."""
        for is_vector in (False, True):  # one message each: every hop costs time, however little it carries
            dtype = torch.float32 if is_vector else matrix_dtype
            buckets = [bucket for bucket in self._buckets if bucket.is_vector == is_vector]
            sizes = [self._share_size(bucket) for bucket in buckets]
            share = torch.zeros(sum(sizes), dtype=dtype, device=target.device)
            parts = [part for one in zip(share.split(sizes), buckets) for part in self._split(*one)]
            torch._foreach_copy_(parts, [pieces[name] for bucket in buckets for name in bucket.offsets])
            received = torch.empty(self._processes.size, len(share), dtype=dtype, device=target.device)
            _all_gather(received.view(-1), share)
            for bucket, columns in zip(buckets, received.split(sizes, dim=1)):
                target[bucket.start : bucket.stop].view_as(columns).copy_(columns)

    def weights(self) -> dict[str, Tensor]:
        return self._gather({name: piece.parameter.detach() for name, piece in self._pieces.items()})

    def tensors(self) -> dict[str, Tensor]:
        return save_state(self._inner, self._pieces, self._gather)

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        load_state(self._inner, self._pieces, tensors, where)

    @torch.no_grad()
    def _gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        # Between steps the gradient buffer is free.
        self._gather_buckets(pieces, self._gradient, torch.float32)
        if not self._processes.is_first:
            return {}
        offsets = {name: offset for bucket in self._buckets for name, offset in bucket.offsets.items()}
        return {name: self._view(self._gradient, name, offsets[name]).to("cpu", copy=True) for name in self._shapes}
