"""LayerNorm(residual + dropout(x + bias)) of a post-LN layer, and LayerNorm alone, which is what most peers have."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
    need_package,
)

EPS = 1e-5
# "plain" is LayerNorm alone.
SETTINGS = [
    Setting(model, dropout, layout)
    for model in MODELS
    for dropout, layout in ((0.1, "full"), (0.0, "full"), (0.0, "plain"))
]  # fmt: skip


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    sequences, length = find_layout(setting, device)
    rows, columns = sequences * length, find_size(setting).hidden
    plain = setting.layout == "plain"
    x, residual, upstream = (make_random((rows, columns), dtype, device, seed) for seed in range(3))
    with torch.no_grad():
        residual[:, ::97] *= 30  # outlier channels, as trained encoders have them
    weight, bias, x_bias = (make_random((columns,), dtype, device, 10 + index) for index in range(3))
    size = x.numel() * dtype.itemsize
    if plain:
        inputs: tuple[Tensor, ...] = (residual, weight, bias)
        forward, backward = Work(0, 2 * size), Work(0, 3 * size)
    else:
        inputs = (x, residual, weight, bias, x_bias)
        forward, backward = Work(0, 3 * size), Work(0, (5 if setting.dropout else 4) * size)
    implementations: dict[str, Build] = {
        EAGER: build_eager(plain),
        OURS: build_ours(plain, torch.tensor([1, 0], device=device)),
    }
    implementations[COMPILED] = compile_function(implementations[EAGER])
    implementations["Liger"] = build_liger(plain, device)
    implementations["apex"] = build_apex(plain, device)
    implementations["flash-attn"] = build_flash(plain, device)
    return Case(
        "layer_norm" if plain else "dropout_add_layer_norm", setting, f"{rows} x {columns}", dtype, inputs,
        implementations, forward, upstream.detach(), backward, build_eager(plain)(0.0),
        twin=build_ours(plain, torch.tensor([1, 0], device=device), impl="torch"),
    )  # fmt: skip


def build_eager(plain: bool) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

        def add_and_normalize(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
            return normalize(residual + F.dropout(x + x_bias, dropout), weight, bias)

        return normalize if plain else add_and_normalize

    return build


def build_ours(plain: bool, seed: Tensor, impl: str | None = None) -> Build:
    from fastroberta_kernels.layer_norm import dropout_add_layer_norm, layer_norm

    def build(dropout: float) -> Callable[..., Tensor]:
        def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return layer_norm(x, weight, bias, eps=EPS, impl=impl)

        def add_and_normalize(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
            return dropout_add_layer_norm(
                x, residual, weight, bias, p=dropout, eps=EPS, x_bias=x_bias, seed=seed, impl=impl
            )

        return normalize if plain else add_and_normalize

    return build


def build_liger(plain: bool, device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        need_package("liger-kernel", gpu=True, device=device)
        if not plain:
            raise Absent("has LayerNorm alone")
        from liger_kernel.transformers.functional import liger_layer_norm

        return lambda x, weight, bias: liger_layer_norm(x, weight, bias, EPS)

    return build


def build_apex(plain: bool, device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        need_package("apex", gpu=True, device=device)
        if not plain:
            raise Absent("has LayerNorm alone")
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, x.shape[-1:], EPS)

    return build


def build_flash(plain: bool, device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        need_package("flash-attn", gpu=True, device=device)
        from flash_attn.ops.triton.layer_norm import layer_norm_fn

        def add_and_normalize(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
            return layer_norm_fn(x + x_bias, weight, bias, residual=residual, eps=EPS, dropout_p=dropout)

        return (lambda x, weight, bias: layer_norm_fn(x, weight, bias, eps=EPS)) if plain else add_and_normalize

    return build
