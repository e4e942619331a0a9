"""Word, position and type embeddings, LayerNorm and dropout."""

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
    SMALL,
    VOCABULARY,
    VOCABULARY_ROWS,
    Build,
    Case,
    Setting,
    Work,
    compile_function,
    find_layout,
    find_size,
    make_random,
)

EPS, PAD = 1e-5, 1
SETTINGS = [Setting(model, dropout) for model in MODELS for dropout in (0.1, 0.0)]


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    (sequences, length), columns = find_layout(setting, device), find_size(setting).hidden
    num_words = 512 if setting.model in SMALL else VOCABULARY_ROWS
    # Token frequencies fall about as 1/rank, so that some rows of the table receive many gradients and most none.
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand((sequences, length), generator=generator)
    ids = (min(num_words, VOCABULARY) - 4) ** uniform + 3
    ids = ids.long().to(device)
    words, positions, types = (
        make_random((rows, columns), torch.float32, device, seed, 0.02)
        for seed, rows in enumerate((num_words, length + 2, 1))
    )
    weight, bias = (make_random((columns,), torch.float32, device, 10 + index) for index in range(2))
    upstream = make_random((sequences, length, columns), dtype, device, 20)
    implementations: dict[str, Build] = {
        EAGER: build_eager(dtype),
        OURS: build_ours(dtype, torch.tensor([1, 0], device=device)),
    }
    implementations[COMPILED] = compile_function(implementations[EAGER])
    tokens = sequences * length
    row = columns * 4
    read = 2 * tokens * row  # word and position rows, fp32
    written = tokens * columns * dtype.itemsize
    return Case(
        "embedding", setting, f"{sequences} x {length} x {columns}, {num_words} rows", dtype,
        (ids, words, positions, types, weight, bias), implementations, Work(0, read + written), upstream.detach(),
        # The gradients, the rows again, and a gradient of the whole table, which is written once.
        Work(0, written + read + tokens * row + num_words * row), build_eager(torch.float64)(0.0),
        twin=build_ours(torch.float64, torch.tensor([1, 0], device=device), impl="torch"),
    )  # fmt: skip


def build_eager(dtype: torch.dtype) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        def embed(ids: Tensor, words: Tensor, positions: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            where = torch.arange(ids.shape[1], device=ids.device) + PAD + 1
            total = F.embedding(ids, words) + F.embedding(where, positions) + types[0]
            return F.dropout(F.layer_norm(total, total.shape[-1:], weight, bias, EPS), dropout).to(dtype)

        return embed

    return build


def build_ours(dtype: torch.dtype, seed: Tensor, impl: str | None = None) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        from fastroberta_kernels.embedding import embedding_layer_norm

        def embed(ids: Tensor, words: Tensor, positions: Tensor, types: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return embedding_layer_norm(
                ids,
                words,
                positions,
                types,
                weight,
                bias,
                padding_idx=PAD,
                p=dropout,
                eps=EPS,
                seed=seed,
                dtype=dtype,
                impl=impl,
            )

        return embed

    return build
