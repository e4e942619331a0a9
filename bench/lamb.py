"""A LAMB step over the parameters of a RoBERTa; AdamW is measured beside it as a yardstick, not as a peer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastroberta_kernels.lamb import FusedLAMB
from torch import Tensor

from .case import (
    EAGER,
    MODELS,
    OURS,
    SIZES,
    VOCABULARY_ROWS,
    Build,
    Case,
    Setting,
    Verdict,
    Work,
    need_package,
    relative_error,
)

SETTINGS = [Setting(model) for model in MODELS]
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
CLIP = 1.0
YARDSTICK = "AdamW, fused (not LAMB)"


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    layers = SIZES[setting.model].layers if device.type == "cuda" else 2
    shapes = list_shapes(setting.model, layers)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).mul_(0.02).to(device) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator).mul_(0.01).to(device) for shape in shapes]
    count = sum(weight.numel() for weight in weights)
    expected = [step_exactly(weight, gradient, norm(gradients)) for weight, gradient in zip(weights, gradients)]

    def build_with(make: Callable[[list[torch.nn.Parameter]], Callable[[], object]]) -> Build:
        def build(dropout: float) -> Callable[..., list[torch.nn.Parameter]]:
            parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
            step = make(parameters)
            for parameter, gradient in zip(parameters, gradients):
                if parameter.grad is None:
                    parameter.grad = gradient.clone()
                else:
                    parameter.grad.copy_(gradient)

            def run(_: Tensor) -> list[torch.nn.Parameter]:
                step()
                return parameters

            return run

        return build

    def make_ours(parameters: list[torch.nn.Parameter]) -> Callable[[], object]:
        # On a GPU its kernels or nothing: what would run in their place is not what this line claims to measure.
        impl = "cuda" if device.type == "cuda" else None
        optimizer = FusedLAMB(parameters, **OPTIONS, max_grad_norm=CLIP, impl=impl)
        optimizer.zero_grad()
        return optimizer.step

    def make_apex(parameters: list[torch.nn.Parameter]) -> Callable[[], object]:
        need_package("apex", gpu=True, device=device)
        from apex.optimizers import FusedLAMB as ApexLAMB

        return ApexLAMB(parameters, **OPTIONS, max_grad_norm=CLIP).step

    def make_adamw(parameters: list[torch.nn.Parameter]) -> Callable[[], object]:
        return torch.optim.AdamW(parameters, **OPTIONS, fused=True).step

    def verify(name: str, function: Callable) -> Verdict:
        if name == YARDSTICK:
            return Verdict({})
        change = torch.cat([(p.detach() - w).flatten() for p, w in zip(function(None), weights)])
        error = relative_error(change, torch.cat([(e - w).flatten() for e, w in zip(expected, weights)]))
        # A change is a thousandth of a weight, which fp32 knows to 3e-5; weight decay is 2e-4 of it.
        return Verdict({"update": error}, None if error < 1e-4 else f"the update is off by {error:.1e}")

    implementations = {
        EAGER: build_with(EagerLamb),
        OURS: build_with(make_ours),
        "apex": build_with(make_apex),
        YARDSTICK: build_with(make_adamw),
    }
    # 44 bytes a parameter: what fused_lamb.cu moves; apex moves 52.
    return Case(
        "lamb", setting, f"{count:,} parameters", torch.float32, (torch.zeros((), device=device),), implementations,
        Work(0, 44 * count), verify=verify,
    )  # fmt: skip


def list_shapes(model: str, layers: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of an encoder and its embeddings."""
    d, f = SIZES[model].hidden, SIZES[model].intermediate
    layer = [(3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (f, d), (f,), (d, f), (d,), (d,), (d,)]
    return [
        (VOCABULARY_ROWS, d),
        (514, d),
        (1, d),
        (d,),
        (d,),
        *(layer * layers),
        (d, d),
        (d,),
        (d,),
        (d,),
        (VOCABULARY_ROWS,),
    ]


def norm(gradients: list[Tensor]) -> float:
    """The global gradient norm, in fp64."""
    return float(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).norm())


def step_exactly(weight: Tensor, gradient: Tensor, gradient_norm: float) -> Tensor:
    """The first LAMB step of one tensor in fp64, rounded to fp32. With bias correction m is the gradient."""
    weight, gradient = weight.double(), gradient.double() / max(1.0, gradient_norm / CLIP)
    update = gradient / (gradient.abs() + OPTIONS["eps"]) + OPTIONS["weight_decay"] * weight
    ratio = weight.norm() / update.norm()
    return (weight - OPTIONS["lr"] * ratio * update).float()


def list_norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each. On a CPU rows come first: one sum over 39 million squares in fp32 is 0.2% off."""
    if tensors[0].is_cuda:
        return list(torch._foreach_norm(tensors))
    return [torch.linalg.vector_norm(torch.linalg.vector_norm(tensor, dim=-1)) for tensor in tensors]


class EagerLamb:
    """LAMB as a page of PyTorch with multi-tensor operations."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = 0

    @torch.no_grad()
    def __call__(self) -> None:
        self.steps += 1
        beta1, beta2 = OPTIONS["betas"]
        weights = [parameter.data for parameter in self.parameters]
        gradients = [parameter.grad for parameter in self.parameters]
        total = torch.stack(list_norms(gradients)).norm()
        gradients = torch._foreach_div(gradients, (total / CLIP).clamp(min=1.0))
        torch._foreach_mul_(self.first, beta1)
        torch._foreach_add_(self.first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_div(self.second, 1 - beta2**self.steps)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, OPTIONS["eps"])
        updates = torch._foreach_div(self.first, 1 - beta1**self.steps)
        torch._foreach_div_(updates, denominators)
        torch._foreach_add_(updates, weights, alpha=OPTIONS["weight_decay"])
        weight_norms, update_norms = torch.stack(list_norms(weights)), torch.stack(list_norms(updates))
        ratios = torch.where((weight_norms > 0) & (update_norms > 0), weight_norms / update_norms, 1.0)
        torch._foreach_mul_(updates, list((OPTIONS["lr"] * ratios).unbind()))
        torch._foreach_sub_(weights, updates)
