"""`sharding: full`: PyTorch's FSDP2 shards the model, and each process updates the rows that it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..config import OptimizerConfig
from ..optim import build_optimizer
from .processes import Processes
from .state import Piece, gradient_of, load_state, save_state


def shard_model(model: Any, processes: Processes) -> None:
    """Shard the model with FSDP2, one layer at a time: it never has to be whole on a GPU."""
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for layer in model.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    for module in (*model.layer, model):
        # Losses are sums. Besides, gloo cannot average, and NCCL's fastest paths cannot scale.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


class FullyShardedOptimizer:
    """A `DistributedOptimizer` for a model that `shard_model` has sharded."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, processes: Processes):
        self._processes = processes
        self._parameters: dict[str, Any] = dict(model.named_parameters())  # DTensors, sharded by rows
        self._pieces = {}
        for name, parameter in self._parameters.items():
            local = parameter.to_local().detach().flatten()
            rows = parameter.shape[0]
            start = min(rows, processes.rank * -(-rows // processes.size)) * (parameter.numel() // rows)
            # A copy: FusedLAMB moves its parameters into buffers of its own.
            own = nn.Parameter(local.clone())
            self._pieces[name] = Piece(own, start, start + local.numel(), parameter.shape)
        own_parameters = {name: piece.parameter for name, piece in self._pieces.items()}
        self._inner = build_optimizer(own_parameters, config, processes.add_up)
        self._inner.zero_grad()
        self.param_groups = self._inner.param_groups

    @property
    def last_grad_norm(self) -> Tensor:
        return self._inner.last_grad_norm

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def last_backward(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # FSDP2 reduces in every backward

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor) -> None:
        own = [piece.parameter for piece in self._pieces.values()]
        reduced = [gradient_of(parameter).to_local().flatten() for parameter in self._parameters.values()]  # type: ignore[attr-defined]
        torch._foreach_copy_([gradient_of(parameter) for parameter in own], reduced)
        self._inner.step(grad_scale=grad_scale)
        torch._foreach_copy_([parameter.to_local().flatten() for parameter in self._parameters.values()], [*own])

    def weights(self) -> dict[str, Tensor]:
        return self._gather({name: piece.parameter.detach() for name, piece in self._pieces.items()})

    def tensors(self) -> dict[str, Tensor]:
        return save_state(self._inner, self._pieces, self._gather)

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        load_state(self._inner, self._pieces, tensors, where)

    @torch.no_grad()
    def _gather(self, pieces: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, parameter in self._parameters.items():
            local = pieces[name].view(parameter.to_local().shape)
            sharded = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            tensor = sharded.full_tensor()
            if self._processes.is_first:
                whole[name] = tensor.cpu()
        return whole
