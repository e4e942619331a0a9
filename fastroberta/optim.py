"""Parameter groups, learning-rate schedules, and which optimizer: from a gradient sum to new weights.

Whichever optimizer it is, gradients lie in one contiguous fp32 buffer of which the parameters' are views: one pass
clears, measures or reduces them all, and micro-batches add up in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fastroberta_kernels.lamb import FusedLAMB
from torch import Tensor, nn

from .config import OptimizerConfig, TrainConfig
from .errors import CheckpointError, ConfigurationError


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of update number `step`, counted from 0: linear warm-up to the highest rate, then the decay to 0.

    The first update already moves (fairseq's rule; Hugging Face's first rate is 0), and so does the last.
    """
    schedule, highest = config.lr_scheduler, config.optimizer.learning_rate
    if step < schedule.warmup_steps:
        return highest * (step + 1) / schedule.warmup_steps
    remaining = (config.max_steps - step) / max(1, config.max_steps - schedule.warmup_steps)
    if schedule.name == "constant":
        return highest
    if schedule.name == "cosine":
        return highest * 0.5 * (1 + math.cos(math.pi * (1 - remaining)))
    return highest * remaining ** (schedule.power if schedule.name == "polynomial" else 1.0)


def is_decayed(name: str, config: OptimizerConfig) -> bool:
    """Whether weight decay applies to the parameter of this name."""
    return config.decay == "all" or not (name.endswith("bias") or "norm" in name.lower())


class LossScaler:
    """Dynamic loss scale for fp16, all of it on the device: halved when gradients overflow, doubled after a while.

    The loss is multiplied by `scale` before the backward, gradients are divided by it (Micikevicius et al., arXiv
    1710.03740, section 3.2). With `enabled=False` the scale is 1 and stays 1.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, found_inf: Tensor) -> None:
        """Take note of a step; `found_inf` is a scalar, 1.0 where its gradients were not finite."""
        if not self.enabled:
            return
        self.good_steps.add_(1).mul_(1 - found_inf)
        grow = self.good_steps >= self.GROWTH_INTERVAL
        self.scale.mul_(torch.where(found_inf > 0, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.masked_fill_(grow, 0.0)

    def state(self) -> dict[str, Tensor]:
        return {"loss_scaler.scale": self.scale, "loss_scaler.good_steps": self.good_steps}


# The norm is taken of rows of so many numbers, and then of those: PyTorch's fp32 norm on a CPU adds up one by one, and
# was measured 1.5% too small for the 124M gradients of roberta-base.
NORM_ROW = 4096


class FlatGradients:
    """One of PyTorch's own kind of optimizers, with FusedLAMB's manners: flat gradients that are divided by a scale, the
    global norm measured and clipped, and a step that is not taken where the norm is not finite.

    Args:
        inner: an optimizer whose step heeds `found_inf`, as PyTorch's fused ones do, or that may ask the device.
        max_grad_norm: bound of the global gradient norm; 0 for none.

    Attributes:
        gradient: fp32 (n,), all gradients. last_grad_norm: fp32 scalar, of the last step, before clipping.
    """

    def __init__(self, inner: torch.optim.Optimizer, max_grad_norm: float):
        self.inner = inner
        self.max_grad_norm = max_grad_norm
        self.param_groups, self.state = inner.param_groups, inner.state
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        ends = torch.tensor([-(-parameter.numel() // 32) * 32 for parameter in parameters]).cumsum(0).tolist()
        device = parameters[0].device
        self.gradient = torch.zeros(-(-ends[-1] // NORM_ROW) * NORM_ROW, device=device)
        self.last_grad_norm = torch.zeros((), device=device)
        for start, parameter in zip([0, *ends], parameters):
            parameter.grad = self.gradient[start : start + parameter.numel()].view_as(parameter)

    def zero_grad(self) -> None:
        self.gradient.zero_()

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor) -> None:
        """Divide the gradients by `grad_scale`, clip them, and take the step; without effect where not finite."""
        row_norms = torch.linalg.vector_norm(self.gradient.view(-1, NORM_ROW), dim=1)
        self.last_grad_norm = torch.linalg.vector_norm(row_norms) / grad_scale
        factor = 1 / grad_scale
        if self.max_grad_norm:
            factor = factor * (self.max_grad_norm / self.last_grad_norm).clamp(max=1.0)
        self.gradient.mul_(factor)
        found_inf = ~torch.isfinite(self.last_grad_norm)
        if isinstance(self.inner, torch.optim.AdamW):
            self.inner.found_inf = found_inf.float()  # type: ignore[attr-defined]  # read by the fused kernel
        elif found_inf:
            return
        self.inner.step()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> FusedLAMB | FlatGradients:
    """The update rule that `config.name` says.

    Raises:
        ConfigurationError: NVIDIA's apex is asked for and not installed.
    """
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        chosen = [p for name, p in model.named_parameters() if is_decayed(name, config) == decays]
        if chosen:
            groups.append({"params": chosen, "weight_decay": config.weight_decay if decays else 0.0})
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.name == "lamb":
        return FusedLAMB(groups, **common, max_grad_norm=config.max_grad_norm)
    if config.name == "adamw":
        return FlatGradients(torch.optim.AdamW(groups, **common, fused=True), config.max_grad_norm)
    try:
        from apex.optimizers import FusedLAMB as ApexLAMB  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigurationError(
            "optimizer.name: apex_lamb needs NVIDIA's apex, built from its source repository; the package that an index "
            "has under the name apex is another project. Use lamb, which is this project's own"
        ) from error
    # Clipped inside the step, as apex does it.
    return FlatGradients(ApexLAMB(groups, **common, max_grad_norm=config.max_grad_norm), 0.0)


def optimizer_tensors(optimizer: FusedLAMB | FlatGradients, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `<kind>.<parameter>`: `exp_avg`, `exp_avg_sq`, `step`."""
    return {
        f"{kind}.{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: FusedLAMB | FlatGradients, model: nn.Module, tensors: dict[str, Tensor], where: str
) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        CheckpointError: state of a parameter is missing or has another shape; `where` says in which checkpoint.
    """
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for kind, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            saved = tensors.get(f"{kind}.{name}")
            if saved is None or saved.shape != shape:
                raise CheckpointError(
                    f"{where}: optimizer state {kind}.{name} is missing or has another shape; continue from another "
                    "checkpoint"
                )
            if kind in state:  # FusedLAMB's state are views of its buffers
                state[kind].copy_(saved)
            else:
                state[kind] = saved.to(parameter.device)
