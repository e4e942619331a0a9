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

from .config import BUCKET_BYTES, OptimizerConfig
from .distributed import Processes
from .errors import CheckpointError
from .optim import build_optimizer

ALIGNMENT = 64  # elements: tensors begin at a cache line in 16-bit buffers too

# PyTorch 2.13 renamed them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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


class FullyShardedOptimizer(ReplicatedOptimizer):
    """`sharding: full`: the model itself is cut by FSDP2, and each process updates the rows that it keeps.

    The model must be as `shard_model` leaves it.
    """

    _is_sharded = True

    def _cut(self, named: dict[str, nn.Parameter]) -> dict[str, Piece]:
        pieces = {}
        for name, parameter in named.items():
            local = parameter.to_local().detach().flatten()  # type: ignore[attr-defined]  # a DTensor, cut by rows
            rows = parameter.shape[0]
            start = min(rows, self.processes.rank * -(-rows // self.processes.size)) * (parameter.numel() // rows)
            # A copy: FusedLAMB moves what it is given into buffers of its own.
            pieces[name] = Piece(nn.Parameter(local.clone()), start, start + local.numel())
        return pieces

    def _prepare_reduction(self, named: dict[str, nn.Parameter]) -> None:
        self._named = named  # FSDP2 reduces in every backward

    def zero_grad(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    @contextlib.contextmanager
    def last_backward(self) -> Iterator[None]:
        yield

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor) -> None:
        gradients = [_grad(parameter).to_local().flatten() for parameter in self._named.values()]  # type: ignore[attr-defined]
        torch._foreach_copy_([_grad(piece.parameter) for piece in self.pieces.values()], gradients)
        self.inner.step(grad_scale=grad_scale)
        local = [parameter.to_local().flatten() for parameter in self._named.values()]  # type: ignore[attr-defined]
        torch._foreach_copy_(local, [piece.parameter for piece in self.pieces.values()])

    @torch.no_grad()
    def _gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        whole = {}
        for name, parameter in self._named.items():
            local = pieces[name].view(parameter.to_local().shape)  # type: ignore[attr-defined]
            spread = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements,  # type: ignore[attr-defined]
                shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
            tensor = spread.full_tensor()
            if self.processes.is_first:
                whole[name] = tensor.cpu()
        return whole


def shard_model(model: Any, processes: Processes) -> None:
    """Cut the model by FSDP2, a layer at a time; it need never be whole on a GPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for layer in model.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    for module in (*model.layer, model):
        # Losses are sums; and gloo has no average, nor can NCCL's fastest paths scale.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


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
