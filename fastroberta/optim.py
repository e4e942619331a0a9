"""From summed gradients to new weights: parameter groups, the schedules of learning rate and batch, the optimizers.

Whichever optimizer it is, gradients lie in one contiguous fp32 buffer of which the parameters' are views: one pass
clears, measures or reduces them all, and micro-batches add up in fp32.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fastroberta_kernels.lamb import FusedLAMB
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .config import OptimizerConfig, TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step `step`, counted from 0: linear warm-up to the peak, then decay to 0.

    The first update already moves (Hugging Face's first rate is 0), and so does the last.
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


class BatchSchedule:
    """Which sequences each step takes, and how many: `train_batch_size`, or fewer during the batch ramp.

    The batch is k times `batch_ramp.start`, where k grows linearly with the tokens seen, from 1 to
    train_batch_size / start after `batch_ramp.tokens`. A function of its arguments alone: neither devices nor
    micro-batches change it.

    Args:
        start: a step, and the sample that it begins with; steps before it are not asked for. Other than (0, 0) where a run
            continues one that had another batch size.
    """

    def __init__(self, config: TrainConfig, start: tuple[int, int] = (0, 0)):
        smallest, full = config.smallest_batch_size, config.train_batch_size
        # First step, first sample and batch size of each level.
        self._levels = [(*start, smallest)]
        ramp_samples = config.batch_ramp.tokens / config.max_seq_length
        for size in range(smallest, full, smallest):
            step, sample, _ = self._levels[-1]
            reached = ramp_samples * (size / smallest) / (full / smallest - 1)
            steps = max(0, math.ceil((reached - sample) / size))
            self._levels.append((step + steps, sample + steps * size, size + smallest))

    def samples(self, step: int) -> range:
        """The numbers, in training order, of the sequences of a step, counted from 0."""
        level = bisect.bisect_right(self._levels, step, key=lambda one: one[0]) - 1
        first_step, first_sample, size = self._levels[level]
        first = first_sample + (step - first_step) * size
        return range(first, first + size)


def settle_epochs(config: TrainConfig, num_sequences: int) -> str:
    """Replace num_train_epochs by the number of steps that so many passes over the training sequences take.

    Returns:
        a line that says so; empty if num_train_epochs is not set.
    """
    epochs = config.num_train_epochs
    if epochs is None:
        return ""
    needed, schedule = math.ceil(epochs * num_sequences), BatchSchedule(config)
    config.settle_steps(bisect.bisect_left(range(needed), needed, key=lambda step: schedule.samples(step).start))
    return f"num_train_epochs = {epochs:g}: {config.max_steps:,} steps, for {num_sequences:,} sequences per epoch"


def is_decayed(name: str, config: OptimizerConfig) -> bool:
    """Whether weight decay applies to the parameter of this name."""
    return config.decay == "all" or not (name.endswith("bias") or "norm" in name.lower())


class LossScaler:
    """Dynamic loss scaling for fp16, entirely on the device: halved when gradients overflow, doubled after a while.

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


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class FlatGradients:
    """PyTorch's fused AdamW with the interface of FusedLAMB: flat gradients that are divided by a scale, their global
    norm measured and clipped, and no step where the norm is not finite.

    The function `adamw`, not the class: that imports the compiler, which takes a second.

    Args:
        param_groups: each with params, lr, betas, eps and weight_decay.
        max_grad_norm: bound of the global gradient norm; 0 for none.
        all_reduce: see `build_optimizer`.

    Attributes:
        state: of each parameter, step (fp32 scalar), exp_avg and exp_avg_sq.
        gradient: fp32 (n,), all gradients. last_grad_norm: fp32 scalar, of the last step, before clipping.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        max_grad_norm: float,
        all_reduce: Callable[[Tensor], Any] | None = None,
    ):
        self.max_grad_norm = max_grad_norm
        self.all_reduce = all_reduce
        self.param_groups = param_groups
        parameters = [parameter for group in param_groups for parameter in group["params"]]
        self.state = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in parameters
        }
        ends = torch.tensor([round_up(parameter.numel(), 32) for parameter in parameters]).cumsum(0).tolist()
        device = parameters[0].device
        self.gradient = torch.zeros(round_up(ends[-1], NORM_ROW), device=device)
        self.last_grad_norm = torch.zeros((), device=device)
        for start, parameter in zip([0, *ends], parameters):
            parameter.grad = self.gradient[start : start + parameter.numel()].view_as(parameter)

    def zero_grad(self) -> None:
        self.gradient.zero_()

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor) -> None:
        """Divide the gradients by `grad_scale`, clip them, and take the step; without effect where not finite."""
        rows = self.gradient.view(self.gradient.numel() // NORM_ROW, NORM_ROW)
        squares = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1)).double().square()
        if self.all_reduce is not None:
            self.all_reduce(squares)
        self.last_grad_norm.copy_(squares.sqrt().float() / grad_scale)  # stays where it is, as a CUDA graph needs it
        factor = 1 / grad_scale
        if self.max_grad_norm:
            factor = factor * (self.max_grad_norm / self.last_grad_norm).clamp(max=1.0)
        self.gradient.mul_(factor)
        found_inf = (~torch.isfinite(self.last_grad_norm)).float()  # read by the kernel, on the device
        for group in self.param_groups:
            states = [self.state[parameter] for parameter in group["params"]]
            gradients = [parameter.grad for parameter in group["params"]]
            first, second, steps = ([one[name] for one in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            adamw(
                group["params"], gradients, first, second, [], steps, fused=True, found_inf=found_inf, amsgrad=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )  # fmt: skip


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, all_reduce: Callable[[Tensor], Any] | None = None
) -> FusedLAMB | FlatGradients:
    """The optimizer that `config.name` asks for.

    Args:
        parameters: by their names in the model, in its order.
        all_reduce: where the parameters are this process's pieces of the model's: sums a tensor over all processes.
    """
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        chosen = [parameter for name, parameter in parameters.items() if is_decayed(name, config) == decays]
        if chosen:
            groups.append({"params": chosen, "weight_decay": config.weight_decay if decays else 0.0})
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.name == "lamb":
        return FusedLAMB(groups, **common, max_grad_norm=config.max_grad_norm, all_reduce=all_reduce)
    return FlatGradients([{**common, **group} for group in groups], config.max_grad_norm, all_reduce)
