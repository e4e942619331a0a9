"""`sharding: optimizer`: each process keeps a part of the moments and of a master copy, and updates that."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import OptimizerConfig
from .processes import Processes
from .replicated import OverlappedReduction, Piece, ReplicatedOptimizer, _grad, _round_up
from .traffic import BUCKET_BYTES

ALIGNMENT = 64  # elements: tensors begin at a cache line in 16-bit buffers too


# PyTorch 2.13 renamed them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ShardedOptimizer(ReplicatedOptimizer):
    """`sharding: optimizer`: each process gets the reduced gradients of its piece of every bucket, and updates that.

    Args:
        gather_dtype: in which updated matrices travel; vectors (biases, LayerNorm) travel in fp32.
    """

    _is_sharded = True

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, processes: Processes, gather_dtype: torch.dtype = torch.float32
    ):
        self.gather_dtype = gather_dtype
        super().__init__(model, config, processes)
        self._spread_weights()

    @torch.no_grad()
    def _cut(self, named: dict[str, nn.Parameter]) -> dict[str, Piece]:
        rank, size = self.processes.rank, self.processes.size
        self._offsets: dict[str, int] = {}
        self._ranges: list[tuple[int, int]] = []
        self._names: list[list[str]] = []
        end = 0
        backwards = list(reversed(named))
        # Vectors share one bucket, the last: they are few, and the embedding's come last.
        for is_vector in (False, True):
            begun = False
            for name in (name for name in backwards if (named[name].dim() < 2) == is_vector):
                count = _round_up(named[name].numel(), ALIGNMENT)
                if not begun or (4 * (end + count - self._ranges[-1][0]) > BUCKET_BYTES and not is_vector):
                    end = _round_up(end, ALIGNMENT * size)
                    self._ranges.append((end, end))
                    self._names.append([])
                    begun = True
                self._names[-1].append(name)
                self._offsets[name] = end
                end += count
                self._ranges[-1] = (self._ranges[-1][0], end)
        # Every bucket in as many equal parts as there are processes.
        self._ranges = [(start, start + _round_up(stop - start, ALIGNMENT * size)) for start, stop in self._ranges]
        device = self.processes.device
        self.weight, self.gradient = (torch.zeros(self._ranges[-1][1], device=device) for _ in range(2))
        pieces = {}
        for (start, stop), names in zip(self._ranges, self._names):
            length = (stop - start) // size
            first = start + rank * length
            for name in names:
                parameter, offset = named[name], self._offsets[name]
                view = self.weight[offset : offset + parameter.numel()].view_as(parameter)
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = self.gradient[offset : offset + parameter.numel()].view_as(parameter)
                low, high = (min(max(bound - offset, 0), parameter.numel()) for bound in (first, first + length))
                pieces[name] = Piece(nn.Parameter(parameter.detach().flatten()[low:high].clone()), low, high)
        return {name: pieces[name] for name in named}

    def _prepare_reduction(self, named: dict[str, nn.Parameter]) -> None:
        self._reduced = [
            torch.zeros((stop - start) // self.processes.size, device=self.processes.device)
            for start, stop in self._ranges
        ]

        def send(index: int) -> Any:
            return _reduce_scatter(self._reduced[index], self.gradient[slice(*self._ranges[index])], async_op=True)

        buckets = [[named[name] for name in names] for names in self._names]
        self._reduction = OverlappedReduction(buckets, send, self._note_waiting)

    def zero_grad(self) -> None:
        self.gradient.zero_()

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor) -> None:
        pieces = [self.pieces[name] for names in self._names for name in names]
        reduced = [part for index in range(len(self._names)) for part in self._parts(self._reduced[index], index)]
        torch._foreach_copy_([_grad(piece.parameter) for piece in pieces], reduced)
        self.inner.step(grad_scale=grad_scale)
        self._spread_weights()

    def _parts(self, shard: Tensor, index: int) -> list[Tensor]:
        """The pieces of bucket `index`'s parameters as views of this process's part of that bucket."""
        start, stop = self._ranges[index]
        first = start + self.processes.rank * ((stop - start) // self.processes.size)
        parts = []
        for name in self._names[index]:
            piece = self.pieces[name]
            begin = max(self._offsets[name] + piece.start - first, 0)
            parts.append(shard[begin : begin + piece.stop - piece.start])
        return parts

    @torch.no_grad()
    def _spread_weights(self) -> None:
        """Every process's updated pieces into all weights."""
        self._gather_buckets(
            {name: piece.parameter for name, piece in self.pieces.items()}, self.weight, self.gather_dtype
        )

    def _gather_buckets(self, pieces: dict[str, Tensor], target: Tensor, matrix_dtype: torch.dtype) -> None:
        """Pieces of every parameter, from all processes, into `target`, which is laid out as the weights are."""
        size = self.processes.size
        for is_vector in (False, True):  # one gather each, because every hop of it costs time whatever it carries
            dtype = torch.float32 if is_vector else matrix_dtype
            indices = [i for i, names in enumerate(self._names) if (len(self.shapes[names[0]]) < 2) == is_vector]
            ranges = [self._ranges[index] for index in indices]
            lengths = [(stop - start) // size for start, stop in ranges]
            shard = torch.zeros(sum(lengths), dtype=dtype, device=target.device)
            parts = [part for index, one in zip(indices, shard.split(lengths)) for part in self._parts(one, index)]
            torch._foreach_copy_(parts, [pieces[name] for index in indices for name in self._names[index]])
            received = torch.empty(size, len(shard), dtype=dtype, device=target.device)
            _all_gather(received.view(-1), shard)
            for (start, stop), columns in zip(ranges, received.split(lengths, dim=1)):
                target[start:stop].view(size, -1).copy_(columns)

    @torch.no_grad()
    def _gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        # Between steps the gradient buffer is free.
        self._gather_buckets(pieces, self.gradient, torch.float32)
        if not self.processes.is_first:
            return {}
        whole = {}
        for name, shape in self.shapes.items():
            offset = self._offsets[name]
            whole[name] = self.gradient[offset : offset + shape.numel()].view(shape).to("cpu", copy=True)
        return whole
