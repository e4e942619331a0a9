"""The optimizer of a run on several processes: what each process keeps, and what the processes send each other.

For n parameters and N processes, each process sends (N - 1) / N of the following bytes per step, which is the least that is
possible:

    sharding    kept by each process (fp32)      reduced                      gathered
    none        weights, gradients, moments      8 n, all-reduce              -
    optimizer   weights, gradients; 1/N of the   4 n, reduce-scatter (gloo's  2 n, or 4 n in fp32
                moments and of a master copy     is an all-reduce: 8 n)
    full        1/N of everything                4 n a micro-batch            4 n a micro-batch, and 4 n more of layers

`none` and `optimizer` reduce gradients once a step, during the backward of the last micro-batch: a bucket of gradients is
sent as soon as all of them are ready. `full` is PyTorch's FSDP2 (`fully_shard`), for models too large for one device:
weights are gathered when a layer needs them and freed afterwards; `cpu_offload` keeps each process's share on the host.
`optimizer` is stage 1 and `full` stage 3 of ZeRO
(Rajbhandari et al., arXiv 1910.02054).

All three compute the same result. In half precision, `optimizer` gathers matrices in 16 bits; matrix products round them
to 16 bits anyway, so only the sum of the embeddings is affected. Master weights and checkpoints are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from ..config import TrainConfig
from .fsdp import FullyShardedOptimizer, shard_model
from .processes import Processes
from .replicated import ReplicatedOptimizer
from .sharded import ShardedOptimizer


class DistributedOptimizer(Protocol):
    """From the gradients of a step to new weights, in all processes. Every process makes the same calls in the same order.

    Attributes:
        param_groups: as in `torch.optim.Optimizer`; the trainer sets `lr` in each group.
    """

    param_groups: list[dict[str, Any]]

    @property
    def last_grad_norm(self) -> Tensor:
        """fp32 scalar: the global gradient norm of the last step, before clipping."""

    def zero_grad(self) -> None:
        """Clear the gradients, before the first micro-batch of a step."""

    def last_backward(self) -> AbstractContextManager[None]:
        """Around the last micro-batch of a step; on leaving, gradients are summed over all processes."""

    def step(self, *, grad_scale: Tensor) -> None:
        """Update the weights with the gradients divided by `grad_scale`; no effect if they are not finite."""

    def weights(self) -> dict[str, Tensor]:
        """The whole fp32 weights by name. Only the first process may use the result."""

    def tensors(self) -> dict[str, Tensor]:
        """The whole `exp_avg`, `exp_avg_sq` and `step` of every parameter, named `<kind>.<parameter>`. Only the first
        process may use the result."""

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """The inverse of `tensors`.

        Raises:
            CheckpointError: the state of a parameter is missing or has the wrong shape; `where` names the checkpoint.
        """


def distribute(model: Any, config: TrainConfig, processes: Processes) -> DistributedOptimizer:
    """Move the model, or this process's shard of it, to its device, and build the optimizer that `config.sharding` asks for.

    Args:
        model: a `RobertaForMaskedLM` with the same weights in every process.
    """
    if config.sharding == "full" and (processes.size > 1 or config.cpu_offload):
        shard_model(model, processes, config.cpu_offload)
        return FullyShardedOptimizer(model, config.optimizer, processes)
    model.to(processes.device)
    if config.sharding == "optimizer" and processes.size > 1:
        return ShardedOptimizer(model, config.optimizer, processes, model.compute_dtype)
    return ReplicatedOptimizer(model, config.optimizer, processes)
