"""Attention of full, padded and packed sequences and in a window, with and without dropout, against SDPA's backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import (
    COMPILED,
    EAGER,
    HEAD_SIZE,
    LENGTH,
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

WINDOW = (64, 64)  # keys to the left and right of a query in ModernBERT's local layers
SETTINGS = [
    Setting(model, dropout, layout)
    for model in MODELS
    for layout in ("full", "padded", "packed", "window")
    for dropout in (0.0, 0.1)
]  # fmt: skip


def draw_spans(layout: str, sequences: int) -> list[list[int]]:
    """Lengths of the spans inside which tokens see each other, for each sequence of LENGTH tokens.

    padded: one span, of 25% to 100%; packed: documents of about 150 tokens, whose lengths are log-normal.
    """
    generator = torch.Generator().manual_seed(1)
    if layout == "padded":
        return [[int(length)] for length in torch.randint(LENGTH // 4, LENGTH + 1, (sequences,), generator=generator)]
    spans = []
    for _ in range(sequences):
        lengths: list[int] = []
        while sum(lengths) < LENGTH:
            drawn = int(torch.randn((), generator=generator).mul(0.8).add(4.7).exp())
            lengths.append(max(1, min(drawn, LENGTH - sum(lengths))))
        spans.append(lengths)
    return spans


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    size, (sequences, length) = find_size(setting), find_layout(setting, device)
    if setting.layout == "window":  # fewer and longer sequences, where a window saves something
        sequences, length = max(1, sequences // 4), length * min(sequences, 4)
    shape = (sequences, length, size.heads, HEAD_SIZE)
    q, k, v, upstream = (make_random(shape, dtype, device, seed) for seed in range(4))
    has_spans = setting.layout in ("padded", "packed")
    spans = draw_spans(setting.layout, sequences) if has_spans else [[length]] * sequences
    mask = key_lengths = bounds = None
    window = (-1, -1)
    if setting.layout == "padded":
        key_lengths = torch.tensor([length for (length,) in spans], dtype=torch.int32, device=device)
        mask = (torch.arange(LENGTH, device=device) < key_lengths[:, None])[:, None, None, :]
    elif setting.layout == "packed":
        lengths = torch.tensor([length for sequence in spans for length in sequence])
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).view(sequences, LENGTH).to(device)
        mask = (document[:, :, None] == document[:, None, :])[:, None]
    elif setting.layout == "window":
        window = WINDOW
        distance = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
        mask = (distance >= -WINDOW[0]) & (distance <= WINDOW[1])

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_eagerly(q, k, v, mask, 0.0)

    implementations: dict[str, Build] = {
        EAGER: lambda dropout: lambda q, k, v: attend_eagerly(q, k, v, mask, dropout),
        OURS: build_ours(key_lengths, bounds, window, torch.tensor([1, 0], device=device)),
    }
    if setting.layout == "full":  # a mask changes what is compiled too little to spend the time on it
        implementations[COMPILED] = compile_function(implementations[EAGER])
    for name in ("FLASH", "CUDNN", "EFFICIENT", "MATH"):
        implementations[f"SDPA {name.lower()}"] = build_sdpa(f"{name}_ATTENTION" if name != "MATH" else name, mask)
    implementations["torch varlen_attn"] = build_torch_varlen(bounds)
    implementations["flash-attn"] = build_flash(setting.layout, bounds, window, device)
    if setting.layout == "window":
        implementations["flex_attention"] = build_flex(length, device)
    # Both products of the forward, five of the backward; a padded query counts, since its output is asked for.
    queries_by_keys = sum(
        keys * (keys if setting.layout == "packed" else length) for sequence in spans for keys in sequence
    )
    if setting.layout == "window":
        queries_by_keys = sequences * int(mask.sum())
    forward = 4 * queries_by_keys * size.heads * HEAD_SIZE
    tensor_bytes = q.numel() * dtype.itemsize
    return Case(
        "attention", setting, f"{sequences} x {length}, {size.heads} heads of {HEAD_SIZE}", dtype, (q, k, v),
        implementations, Work(forward, 4 * tensor_bytes), upstream.detach(), Work(2.5 * forward, 8 * tensor_bytes),
        exact, twin=build_ours(key_lengths, bounds, window, torch.tensor([1, 0], device=device), impl="torch"),
    )  # fmt: skip


def attend_eagerly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention as a page of PyTorch: (b, l, h, e) in and out."""
    q, k, v = (value.transpose(1, 2) for value in (q, k, v))
    scores = q @ k.transpose(2, 3) * HEAD_SIZE**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (F.dropout(scores.softmax(-1), dropout) @ v).transpose(1, 2)


def build_ours(
    key_lengths: Tensor | None, bounds: Tensor | None, window: tuple[int, int], seed: Tensor, impl: str | None = None
) -> Build:
    from fastroberta_kernels.attention import attention, varlen_attention

    def build(dropout: float) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if bounds is None:
                options = {"key_lengths": key_lengths, "window_size": window, "impl": impl}
                return attention(q, k, v, dropout_p=dropout, seed=seed, **options)
            flat = (value.flatten(0, 1) for value in (q, k, v))
            out = varlen_attention(*flat, bounds, bounds, LENGTH, LENGTH, dropout_p=dropout, seed=seed, impl=impl)
            return out.view_as(q)

        return attend

    return build


def build_sdpa(backend: str, mask: Tensor | None) -> Build:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def build(dropout: float) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                try:
                    out = F.scaled_dot_product_attention(
                        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, dropout_p=dropout
                    )
                except RuntimeError as error:
                    if "No viable backend" in str(error) or "No available kernel" in str(error):
                        raise Absent("this backend does not take such inputs on this device") from error
                    raise
            return out.transpose(1, 2)

        return attend

    return build


def build_torch_varlen(bounds: Tensor | None) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Absent("not in this version of PyTorch") from error
        if bounds is None:
            raise Absent("for packed sequences")
        if bounds.device.type != "cuda":
            raise Absent("needs a GPU")
        if dropout:
            raise Absent("has no dropout")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat = (value.flatten(0, 1) for value in (q, k, v))
            return varlen_attn(*flat, bounds, bounds, LENGTH, LENGTH).view_as(q)

        return attend

    return build


def build_flex(length: int, device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        if device.type != "cuda":
            raise Absent("has no backward on a CPU")
        if dropout:
            raise Absent("has no dropout")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key - query >= -WINDOW[0]) & (key - query <= WINDOW[1])

        blocks = create_block_mask(is_seen, None, None, length, length, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return compiled(*(value.transpose(1, 2) for value in (q, k, v)), block_mask=blocks).transpose(1, 2)

        return attend

    return build


def build_flash(layout: str, bounds: Tensor | None, window: tuple[int, int], device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        need_package("flash-attn", gpu=True, device=device)
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        if layout == "padded":
            raise Absent("takes no padding; it would be removed first")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if bounds is None:
                return flash_attn_func(q, k, v, dropout_p=dropout, window_size=window)
            flat = (value.flatten(0, 1) for value in (q, k, v))
            return flash_attn_varlen_func(*flat, bounds, bounds, LENGTH, LENGTH, dropout_p=dropout).view_as(q)

        return attend

    return build
