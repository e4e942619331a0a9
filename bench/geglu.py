"""GeGLU, the gated MLP activation of ModernBERT: gelu(a) * b, where a and b are the halves of one projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastroberta_kernels.gelu import geglu
from torch import Tensor

from .case import (
    COMPILED,
    EAGER,
    MODELS,
    OURS,
    Build,
    Case,
    Setting,
    Work,
    compile_function,
    find_layout,
    find_size,
    make_random,
    need_package,
)

WIDTHS = {"base": 1152, "large": 2624}  # ModernBERT's; other sizes take RoBERTa's
SETTINGS = [Setting(model) for model in MODELS]


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    sequences, length = find_layout(setting, device)
    rows, columns = sequences * length, WIDTHS.get(setting.model, find_size(setting).intermediate)
    x = make_random((rows, 2 * columns), dtype, device, 0)
    upstream = make_random((rows, columns), dtype, device, 1)
    implementations: dict[str, Build] = {
        EAGER: lambda dropout: gate_eagerly,
        OURS: lambda dropout: geglu,
        "Liger (tanh)": build_liger(device),
    }
    implementations[COMPILED] = compile_function(implementations[EAGER])
    size = upstream.numel() * dtype.itemsize
    return Case(
        "geglu", setting, f"{rows} x {columns}", dtype, (x,), implementations, Work(0, 3 * size), upstream.detach(),
        Work(0, 5 * size), gate_eagerly,
    )  # fmt: skip


def gate_eagerly(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return F.gelu(a) * b


def build_liger(device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        need_package("liger-kernel", gpu=True, device=device)
        from liger_kernel.transformers.functional import liger_geglu

        # It has the tanh approximation only, and takes two tensors of their own.
        return lambda x: liger_geglu(*x.chunk(2, -1))

    return build
