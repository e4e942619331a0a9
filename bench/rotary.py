"""Rotary positions of ModernBERT: queries and keys rotated in one pass, read from one fused projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastroberta_kernels.rotary import apply_rotary, make_tables
from torch import Tensor

from .case import (
    COMPILED,
    EAGER,
    HEAD_SIZE,
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

SETTINGS = [Setting(model) for model in MODELS]


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    (sequences, length), heads = find_layout(setting, device), find_size(setting).heads
    shape = (sequences, length, heads, HEAD_SIZE)
    qkv = make_random((sequences, length, 3, heads, HEAD_SIZE), dtype, device, 0).detach()
    q, k = (value.requires_grad_() for value in qkv.unbind(2)[:2])  # views of the projection, as in a model
    upstream = tuple(make_random(shape, dtype, device, seed).detach() for seed in (1, 2))
    cos, sin = make_tables(length, HEAD_SIZE, device=device)
    implementations: dict[str, Build] = {
        EAGER: lambda dropout: rotate_eagerly,
        OURS: lambda dropout: apply_rotary,
        "Liger": lambda dropout: refuse("overwrites its inputs"),
        "flash-attn": build_flash(device),
    }
    implementations[COMPILED] = compile_function(implementations[EAGER])
    # Queries and keys are read and written, in either direction; the tables are read once.
    size = 2 * 2 * q.numel() * dtype.itemsize + 2 * cos.numel() * cos.element_size()
    return Case(
        "rotary", setting, f"{sequences} x {length}, {heads} heads of {HEAD_SIZE}", dtype, (q, k, cos, sin),
        implementations, Work(0, size), upstream, Work(0, size), rotate_eagerly,
    )  # fmt: skip


def rotate_eagerly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers computes it: fp32 tables repeated for both halves of a head."""
    cos, sin = (torch.cat((table, table), -1)[:, None] for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    return rotate(q), rotate(k)


def build_flash(device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., tuple[Tensor, Tensor]]:
        need_package("flash-attn", gpu=True, device=device)
        from flash_attn.layers.rotary import apply_rotary_emb

        return lambda q, k, cos, sin: (apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin))

    return build


def refuse(reason: str):
    raise Absent(reason)
