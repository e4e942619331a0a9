"""`sharding: full`: PyTorch's FSDP2 cuts the model; each process updates the rows that it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .processes import Processes
from .replicated import Piece, ReplicatedOptimizer, _grad


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
