"""The decoder and its loss on the masked tokens of a micro-batch: 77 a sequence, 50,265 classes in 50,304 rows."""

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
    Absent,
    Build,
    Case,
    Setting,
    Work,
    compile_function,
    count_sequences,
    find_size,
    make_random,
    need_package,
)

MASKED = 77  # tokens of a sequence of 512
# 50,265 classes are padded to 50,304 rows in training, by every implementation alike: here all of them are classes.
ROWS = 50304
SETTINGS = [Setting(model) for model in MODELS]


def make_case(setting: Setting, device: torch.device, dtype: torch.dtype) -> Case:
    rows, columns = max(4, count_sequences(device)) * MASKED, find_size(setting).hidden
    classes, num_targets = ROWS, VOCABULARY
    if setting.model in SMALL:
        rows, classes, num_targets = SMALL[setting.model][0], 512, 512
    hidden = make_random((rows, columns), dtype, device, 0)
    weight = make_random((classes, columns), dtype, device, 1, 0.02)
    bias = make_random((classes,), dtype, device, 2, 0.5)
    targets = torch.randint(num_targets, (rows,), generator=torch.Generator().manual_seed(3)).to(device)
    implementations: dict[str, Build] = {EAGER: lambda dropout: compute_eagerly, OURS: build_ours()}
    implementations[COMPILED] = compile_function(implementations[EAGER])
    implementations["F.linear_cross_entropy"] = lambda dropout: find_in_torch()
    implementations["Liger"] = build_liger(device)
    implementations["cut-cross-entropy"] = build_cut(device)
    product = 2 * rows * columns * classes
    parameters = classes * columns * dtype.itemsize
    return Case(
        "linear_cross_entropy", setting, f"{rows} x {columns} x {classes}", dtype, (hidden, weight, bias, targets),
        implementations, Work(product, parameters + hidden.numel() * dtype.itemsize), torch.ones((), device=device),
        Work(2 * product, 2 * parameters + 2 * hidden.numel() * dtype.itemsize), compute_eagerly,
    )  # fmt: skip


def compute_eagerly(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean loss, with all logits in memory, in fp32 as transformers computes it (fp64 for fp64)."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def build_ours() -> Build:
    from fastroberta_kernels.cross_entropy import linear_cross_entropy

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, bias, targets).loss

    return lambda dropout: compute


def find_in_torch() -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent("not in this version of PyTorch")
    # Without options it computes whole logits; with them it works in chunks, which is what it is for.
    options = torch.nn.LinearCrossEntropyOptions() if hasattr(torch.nn, "LinearCrossEntropyOptions") else None

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, options=options).float()

    return compute


def build_liger(device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        need_package("liger-kernel", gpu=True, device=device)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
            result = liger_fused_linear_cross_entropy(hidden, weight, targets, bias, accum_dtype=torch.float32)
            return (result[0] if isinstance(result, tuple) else result).float()

        return compute

    return build


def build_cut(device: torch.device) -> Build:
    def build(dropout: float) -> Callable[..., Tensor]:
        need_package("cut-cross-entropy", gpu=True, device=device)
        from cut_cross_entropy import linear_cross_entropy

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
            # It takes no bias: that becomes one more column (of 64, for alignment), which a user would do as well.
            wide_hidden = F.pad(F.pad(hidden, (0, 1), value=1.0), (0, 63))
            wide_weight = F.pad(torch.cat((weight, bias[:, None]), 1), (0, 63))
            return linear_cross_entropy(wide_hidden, wide_weight, targets).float()

        return compute

    return build
