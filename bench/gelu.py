"""Bias and exact GELU of the MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fastroberta_kernels.gelu import bias_gelu

from .case import (
    COMPILED,
    EAGER,
    MODELS,
    OURS,
    Absent,
    Build,
    Case,
    Setting,
    Work,
    compile_function,
    find_layout,
    find_size,
    make_random,
)

SETTINGS = [Setting(model) for model in MODELS]


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    sequences, length = find_layout(setting, device)
    rows, columns = sequences * length, find_size(setting).intermediate
    x, upstream = (make_random((rows, columns), dtype, device, seed) for seed in range(2))
    bias = make_random((columns,), dtype, device, 2)
    implementations: dict[str, Build] = {
        EAGER: lambda dropout: lambda x, bias: F.gelu(x + bias),
        OURS: lambda dropout: lambda x, bias: bias_gelu(x, bias),
        "Liger": lambda dropout: refuse("has GEGLU, not GELU with a bias"),
        "apex": lambda dropout: refuse("has it inside its fused MLP only"),
    }
    implementations[COMPILED] = compile_function(implementations[EAGER])
    size = x.numel() * dtype.itemsize
    return Case(
        "bias_gelu", setting, f"{rows} x {columns}", dtype, (x, bias), implementations, Work(0, 2 * size),
        upstream.detach(), Work(0, 3 * size), lambda x, bias: F.gelu(x + bias),
    )  # fmt: skip


def refuse(reason: str):
    raise Absent(reason)
