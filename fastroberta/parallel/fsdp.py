"""`sharding: full`: PyTorch's FSDP2 shards the model, and each process updates the rows that it keeps.

With `cpu_offload` those rows, their gradients and their moments stay in the host's memory, where they are updated. A
layer's weights are sent to the device when it needs them, and its gradients are sent back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..config import OptimizerConfig
from ..optim import build_optimizer
from .processes import Processes
from .state import Piece, gradient_of, load_state, save_state


def shard_model(model: Any, processes: Processes, cpu_offload: bool = False) -> None:
    """Shard the model with FSDP2, one layer at a time: it never has to be whole on a GPU.

    Args:
        cpu_offload: keep what the process owns in the host's memory, pinned if the device is a GPU.
    """
    kind = processes.device.type
    if not dist.is_initialized():  # a single process; FSDP2 needs a group even so
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(kind, (processes.size,))
    policy = CPUOffloadPolicy(pin_memory=kind == "cuda") if cpu_offload else OffloadPolicy()
    for module in (*model.layer, model):
        fully_shard(module, mesh=mesh, offload_policy=policy)
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
        self._inner = build_optimizer(own_parameters, config, self._add_up)
        self._inner.zero_grad()
        self.param_groups = self._inner.param_groups

    def _add_up(self, tensor: Tensor) -> Tensor:
        """`Processes.add_up` for tensors of the update rule: with cpu_offload they are on the host, and NCCL is not."""
        return tensor.copy_(self._processes.add_up(tensor.to(self._processes.device)))

    @property
    def last_grad_norm(self) -> Tensor:
        return self._inner.last_grad_norm.to(self._processes.device)

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
        self._inner.step(grad_scale=grad_scale.to(own[0].device))
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
            local = pieces[name].view(parameter.to_local().shape).to(self._processes.device)
            sharded = DTensor.from_local(
                local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            tensor = sharded.full_tensor()
            if self._processes.is_first:
                whole[name] = tensor.cpu()
        return whole
