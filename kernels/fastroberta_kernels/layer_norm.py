"""LayerNorm, alone or fused with what precedes it in a post-layer-norm transformer: bias, dropout and residual.

For each row of N columns, with keep bits m (0 or 1) and scale s = 1 / P(keep):

    z     = residual + s * m * (x + x_bias)             (z = x for `layer_norm`)
    mean  = sum(z) / N,  rstd = 1 / sqrt(sum((z - mean)^2) / N + eps)
    x_hat = (z - mean) * rstd
    y     = x_hat * weight + bias

    g         = dy * weight
    dz        = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    dresidual = dz,  dx = s * m * dz
    dweight   = sum over rows of dy * x_hat,  dbias = sum of dy,  dx_bias = sum of dx

Any of residual, x_bias and bias may be absent; their gradients are then not computed. ModernBERT, for instance, has no
biases. An absent weight is filled in with ones.

Shapes: x, residual, y (..., N), of which the leading dimensions are flattened into rows; weight, bias, x_bias (N,).
Dtypes: fp32, bf16 or fp16, in any mixture. y has the dtype of x, each gradient that of its tensor. All arithmetic is
fp32, and z is never rounded to a narrower dtype. Mean and variance take two passes over registers, the second over
centred values and corrected for the rounding of the mean (the corrected two-pass algorithm of Chan, Golub, LeVeque,
"Algorithms for Computing the Sample Variance", The American Statistician 37, 1983), so a large mean costs no accuracy.

Saved for the backward: the inputs, and 12 bytes per row: the mean, its correction, and rstd. z is recomputed from x and
residual, not stored. The residual of a post-layer-norm layer is kept anyway, by the linear layer that reads it next to
this one. Storing z would therefore take as much memory as keeping x and as much traffic (the backward reads one tensor
less, the forward writes one more), and it would round z to the dtype of x. Recomputing x_hat from y would fail where a
weight is zero.
Bytes moved per element, for tensors of b bytes: forward 3b (x, residual, y); backward 5b with dropout (dy, x, residual,
dx, dresidual), 4b without it, where dx and dresidual are one tensor. `layer_norm`: 2b and 3b. With a bound on |y| the
forward also writes y in 8 bits (see `fp8`), 1 byte, for its products.
Rows are kept in registers. Those longer than 4096 columns, or not a multiple of 16 long, are taken a block of columns at
a time: the forward then reads x and residual three times, the backward dy, x and residual twice, mostly from L2.

Random numbers: the dropout decisions of `philox` for head 0, where a row's number is its index in the flattened leading
dimensions. The backward draws them again, so no mask is stored.

Determinism: no atomics; the parameters' gradients are summed as described in `_rows`. There are as many programs as the
GPU can hold, so the order of the sums, and with it a gradient's last bits, depends on the GPU model. On one model
repeated runs give the same bits.

Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450, section 3. The sublayer LayerNorm(residual +
dropout(x)) is that of Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 5.4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from . import philox
from ._dispatch import align, is_transforming, jit, launch, operator, tl, use_triton
from ._rows import KERNEL_DTYPES, REGISTER_LIMIT, count_programs, sum_partials, unify_dtypes
from .fp8 import E4M3, TOPS, Scaled, allocate, cast_torch, make_scale

LONGEST_WHOLE_ROW = 4096  # longer rows do not fit in the registers of one program
# num_stages and maxnreg of the backward by BLOCK. Where registers allow, the next one or two tiles are prefetched. None of
# these spills with Triton 3.6.0 to 3.9.0.
BACKWARD_STAGES_AND_REGISTERS = {
    128: (1, REGISTER_LIMIT),
    256: (1, REGISTER_LIMIT),
    512: (3, None),
    1024: (3, REGISTER_LIMIT),
    2048: (2, 255),
    4096: (2, 255),
}
ELEMENTS = {"forward": 2048, "backward": 2048}  # of a tile of whole rows; at least one row
# Tiles for rows that are taken a block of columns at a time.
ROW_IN_BLOCKS = {"ROWS": 1, "BLOCK": 512, "num_warps": 4}
BACKWARD_IN_BLOCKS = {"ROWS": 4, "BLOCK": 256}


def layer_norm_torch(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = 1e-5
) -> torch.Tensor:
    """`layer_norm` in PyTorch operations."""
    # In fp32 at least: on a CPU ATen sums the parameters' gradients in the dtype of the input, which is 5% off in bf16
    # after 2,048 rows.
    dtype = torch.promote_types(x.dtype, torch.float32 if weight is None else weight.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    weight, bias = (None if vector is None else vector.to(dtype) for vector in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


class _DropoutAdd(torch.autograd.Function):
    """residual + scale * mask * x in bf16 or fp16, where the derivative of addcmul would round the scale.

    A rounded scale shifts every mean. The context comes as an argument of the forward, since PyTorch takes twice as long to
    call a function with a setup_context of its own, which torch.func would need.
    """

    @staticmethod
    def forward(ctx, x, residual, mask, scale):
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return torch.addcmul(residual, x, mask, value=scale)

    @staticmethod
    def backward(ctx, dz):
        (mask,) = ctx.saved_tensors
        return (dz * mask).mul_(ctx.scale), dz, None, None


def dropout_add_layer_norm_torch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    p: float = 0.0,
    eps: float = 1e-5,
    x_bias: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dropout_add_layer_norm` in PyTorch operations; `seed` is as `philox.as_seed` returns it."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if p > 0:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        keep = philox.dropout_keep_torch(seed, p, math.prod(x.shape[:-1]), x.shape[-1]).view(x.shape)
        mask = keep.view(torch.uint8).to(dtype)  # uint8 converts to floating point eight times faster than bool
        scale, wide_x, wide_residual = philox.dropout_scale(p), x.to(dtype), residual.to(dtype)
        if dtype.itemsize >= 4:
            z = torch.addcmul(wide_residual, wide_x, mask, value=scale)
        elif is_transforming():
            z = torch.add(wide_residual, wide_x * mask, alpha=scale)
        else:
            z = _DropoutAdd.apply(wide_x, wide_residual, mask, scale)
    else:
        z = residual + x
    return layer_norm_torch(z, weight, bias, eps).to(x.dtype)


@jit
def _load_tile(
    x_ptr, residual_ptr, x_bias_ptr, rows, row_mask, first_column, num_columns, k0, k1, first_row, threshold, scale,
    HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z of a tile in fp32, what dropout keeps of it, and its columns, offsets and masks.

    Absent pointers are None. In rows past the end z is the bias, so it must be masked before it is summed.
    """
    columns = first_column + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = rows[:, None] * num_columns + columns[None, :]
    keep = mask
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_DROPOUT:
        head = tl.program_id(0) * 0
        keep = philox.dropout_keep(k0, k1, rows + first_row, head, first_column, threshold, ROWS, BLOCK)
        z = tl.where(keep, z, 0.0) * scale
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return z, keep, columns, offsets, column_mask, mask


@jit(do_not_specialize=["num_rows", "threshold"])
def _layer_norm_forward_kernel(
    x_ptr, residual_ptr, x_bias_ptr, weight_ptr, bias_ptr, seed_ptr,  # (rows, N), (rows, N), (N,), (N,), (N,), (2,)
    y_ptr, statistics_ptr,  # (rows, N), fp32 (3, rows): mean, correction of the mean, rstd
    bound_ptr, y_8_ptr, inverse_ptr,  # of y in 8 bits: fp32 scalar, (rows, N), fp32 scalar; or None
    num_rows, statistics_stride, num_columns, threshold, scale, eps,
    HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows, in three passes over blocks of columns: mean, variance, output.

    Where a row is one block (IS_WHOLE), the loops have one iteration. The compiler unrolls them and merges their equal
    loads and draws, so the row is read once and stays in registers.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    end = BLOCK if IS_WHOLE else num_columns
    k0, k1, first_row = 0, 0, 0
    if HAS_DROPOUT:
        k0, k1, first_row = philox.load_seed(seed_ptr)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, end, BLOCK):
        z, _, _, _, _, mask = _load_tile(
            x_ptr, residual_ptr, x_bias_ptr, rows, row_mask, start, num_columns, k0, k1, first_row, threshold, scale,
            HAS_DROPOUT, ROWS, BLOCK,
        )  # fmt: skip
        total += tl.where(mask, z, 0.0)
    mean = tl.sum(total, axis=1) / num_columns
    # A large mean is itself rounded, which would shift the whole row; the mean of the centred values corrects it.
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, end, BLOCK):
        z, _, _, _, _, mask = _load_tile(
            x_ptr, residual_ptr, x_bias_ptr, rows, row_mask, start, num_columns, k0, k1, first_row, threshold, scale,
            HAS_DROPOUT, ROWS, BLOCK,
        )  # fmt: skip
        centred = tl.where(mask, z - mean[:, None], 0.0)
        total += centred
        squares += centred * centred
    correction = tl.sum(total, axis=1) / num_columns
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / num_columns - correction * correction + eps)
    if y_8_ptr is not None:
        scale_8, inverse = make_scale(tl.load(bound_ptr), TOP)
        tl.store(inverse_ptr, inverse, mask=tl.program_id(0) == 0)
    for start in range(0, end, BLOCK):
        z, _, columns, offsets, column_mask, mask = _load_tile(
            x_ptr, residual_ptr, x_bias_ptr, rows, row_mask, start, num_columns, k0, k1, first_row, threshold, scale,
            HAS_DROPOUT, ROWS, BLOCK,
        )  # fmt: skip
        weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        x_hat = (tl.where(mask, z - mean[:, None], 0.0) - correction[:, None]) * rstd[:, None]
        y = x_hat * weight[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        if y_8_ptr is not None:
            tl.store(y_8_ptr + offsets, (y * scale_8).to(y_8_ptr.dtype.element_ty), mask=mask)
    tl.store(statistics_ptr + rows, mean, mask=row_mask)
    tl.store(statistics_ptr + statistics_stride + rows, correction, mask=row_mask)
    tl.store(statistics_ptr + statistics_stride + statistics_stride + rows, rstd, mask=row_mask)


@jit
def _load_statistics(statistics_ptr, statistics_stride, rows, row_mask):
    """Mean, its correction and rstd of rows; all zero past the end."""
    mean = tl.load(statistics_ptr + rows, mask=row_mask, other=0.0)
    correction = tl.load(statistics_ptr + statistics_stride + rows, mask=row_mask, other=0.0)
    rstd = tl.load(statistics_ptr + statistics_stride + statistics_stride + rows, mask=row_mask, other=0.0)
    return mean, correction, rstd


@jit(do_not_specialize=["num_rows", "threshold"])
def _gradient_means_kernel(
    dy_ptr, x_ptr, residual_ptr, x_bias_ptr, weight_ptr, seed_ptr, statistics_ptr,  # as in the forward
    means_ptr,  # fp32 (2, rows): mean(g), mean(g * x_hat)
    num_rows, statistics_stride, num_columns, threshold, scale,
    HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The means over a row that the backward needs before it can work on a block of that row. One program: one row."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row_mask = rows < num_rows
    mean, correction, rstd = _load_statistics(statistics_ptr, statistics_stride, rows, row_mask)
    k0, k1, first_row = 0, 0, 0
    if HAS_DROPOUT:
        k0, k1, first_row = philox.load_seed(seed_ptr)
    g_sum = tl.zeros((1, BLOCK), dtype=tl.float32)
    g_x_hat_sum = tl.zeros((1, BLOCK), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        z, _, columns, offsets, column_mask, mask = _load_tile(
            x_ptr, residual_ptr, x_bias_ptr, rows, row_mask, start, num_columns, k0, k1, first_row, threshold, scale,
            HAS_DROPOUT, 1, BLOCK,
        )  # fmt: skip
        weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
        g_sum += g
        g_x_hat_sum += g * (((z - mean[:, None]) - correction[:, None]) * rstd[:, None])
    tl.store(means_ptr + rows, tl.sum(g_sum, axis=1) / num_columns, mask=row_mask)
    tl.store(means_ptr + statistics_stride + rows, tl.sum(g_x_hat_sum, axis=1) / num_columns, mask=row_mask)


@jit(do_not_specialize=["num_rows", "threshold"])
def _layer_norm_backward_kernel(
    dy_ptr, x_ptr, residual_ptr, x_bias_ptr, weight_ptr, seed_ptr, statistics_ptr,  # as in the forward
    means_ptr,  # of _gradient_means_kernel; None where a row is one block
    dx_ptr, dresidual_ptr,  # (rows, N); dresidual is None where it is dx
    partials_ptr,  # fp32 (1 to 3, programs, N): dweight, then those of dbias and dx_bias that are wanted
    num_rows, statistics_stride, num_columns, threshold, scale,
    HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: a block of columns, over rows at a fixed stride. Grid (programs, blocks)."""
    first_column = 0 if means_ptr is None else tl.program_id(1) * BLOCK
    columns = first_column + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dx_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    k0, k1, first_row = 0, 0, 0
    if HAS_DROPOUT:
        k0, k1, first_row = philox.load_seed(seed_ptr)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < num_rows
        mean, correction, rstd = _load_statistics(statistics_ptr, statistics_stride, rows, row_mask)
        z, keep, _, offsets, _, mask = _load_tile(
            x_ptr, residual_ptr, x_bias_ptr, rows, row_mask, first_column, num_columns, k0, k1, first_row, threshold,
            scale, HAS_DROPOUT, ROWS, BLOCK,
        )  # fmt: skip
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # Outside the mask dy is zero, so x_hat adds nothing there, whatever it is; dz is never stored there.
        x_hat = ((z - mean[:, None]) - correction[:, None]) * rstd[:, None]
        dweight += dy * x_hat
        if HAS_BIAS:
            dbias += dy
        g = dy * weight[None, :]
        if means_ptr is None:
            mean_g = tl.sum(g, axis=1) / num_columns
            mean_g_x_hat = tl.sum(g * x_hat, axis=1) / num_columns
        else:
            mean_g = tl.load(means_ptr + rows, mask=row_mask, other=0.0)
            mean_g_x_hat = tl.load(means_ptr + statistics_stride + rows, mask=row_mask, other=0.0)
        dz = rstd[:, None] * (g - mean_g[:, None] - x_hat * mean_g_x_hat[:, None])
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if HAS_DROPOUT:
            dz = tl.where(keep, dz, 0.0) * scale
        tl.store(dx_ptr + offsets, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        if x_bias_ptr is not None:
            dx_bias += dz  # zero in rows past the end, where rstd is zero
    partials_ptr += tl.program_id(0).to(tl.int64) * num_columns + columns
    stride = tl.num_programs(0).to(tl.int64) * num_columns
    tl.store(partials_ptr, tl.sum(dweight, axis=0), mask=column_mask)
    if HAS_BIAS:
        partials_ptr += stride
        tl.store(partials_ptr, tl.sum(dbias, axis=0), mask=column_mask)
    if x_bias_ptr is not None:
        tl.store(partials_ptr + stride, tl.sum(dx_bias, axis=0), mask=column_mask)


def _is_whole(num_columns: int) -> bool:
    """Whether rows are taken as one block. Unaligned ones are not: without vector loads their addresses would spill."""
    return num_columns <= LONGEST_WHOLE_ROW and num_columns % 16 == 0


def _whole_tile(num_columns: int, direction: str) -> dict[str, int]:
    """ROWS and BLOCK for whole rows, as many as make up ELEMENTS."""
    block = max(128, 1 << (num_columns - 1).bit_length())
    return {"ROWS": max(1, ELEMENTS[direction] // block), "BLOCK": block}


@operator("layer_norm_forward")
def _layer_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, statistics = _allocate_forward(x, residual, x_bias, weight, bias, seed, p, eps)
    _launch_forward(x, residual, x_bias, weight, bias, seed, p, eps, y, statistics)
    return y, statistics


def _launch_forward(x, residual, x_bias, weight, bias, seed, p, eps, y, statistics, *in_8_bits):
    """`in_8_bits`: the bound on y; y in 8 bits and its inverse scale, to be written."""
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    arguments = (
        *map(align, (x, residual, x_bias, weight, bias, seed)), y, statistics, *(in_8_bits or (None,) * 3),
        num_rows, statistics.shape[1], num_columns, philox.dropout_threshold(p), philox.dropout_scale(p), eps,
    )  # fmt: skip
    if is_whole := _is_whole(num_columns):
        tile = _whole_tile(num_columns, "forward")
        tile["num_warps"] = 16 if tile["BLOCK"] > 2048 else 4
        registers = REGISTER_LIMIT if tile["BLOCK"] == 2048 else None
    else:
        tile, registers = ROW_IN_BLOCKS, REGISTER_LIMIT
    launch(
        _layer_norm_forward_kernel, (-(-num_rows // tile["ROWS"]),), *arguments,
        HAS_DROPOUT=p > 0, **tile, IS_WHOLE=is_whole, TOP=TOPS[E4M3], maxnreg=registers,
    )  # fmt: skip


@_layer_norm_forward.register_fake
def _allocate_forward(x, residual, x_bias, weight, bias, seed, p, eps):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.zeros((3, -(-math.prod(x.shape[:-1]) // 16) * 16), dtype=torch.float32, device=x.device)


@operator("layer_norm_forward_fp8")
def _layer_norm_forward_fp8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    bound: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_layer_norm_forward`, and y in 8 bits with its inverse scale."""
    outputs = _allocate_forward_fp8(x, residual, x_bias, weight, bias, seed, p, eps, bound)
    y, statistics, y_8, inverse = outputs
    _launch_forward(x, residual, x_bias, weight, bias, seed, p, eps, y, statistics, bound, y_8, inverse)
    return outputs


@_layer_norm_forward_fp8.register_fake
def _allocate_forward_fp8(x, residual, x_bias, weight, bias, seed, p, eps, bound):
    y, statistics = _allocate_forward(x, residual, x_bias, weight, bias, seed, p, eps)
    return y, statistics, *allocate(x, E4M3)


@operator("layer_norm_backward")
def _layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    statistics: torch.Tensor,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dresidual, dx_bias, dweight and dbias; those that are absent or equal to dx are empty."""
    gradients = _allocate_backward(dy, x, residual, x_bias, weight, bias, seed, statistics, p)
    dx, dresidual, dx_bias, dweight, dbias = gradients
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    inputs = (*map(align, (dy, x, residual, x_bias, weight, seed)), statistics)
    outputs = (dx, dresidual if _has_own_dresidual(x, residual, p) else None)
    scalars = (num_rows, statistics.shape[1], num_columns, philox.dropout_threshold(p), philox.dropout_scale(p))
    sums = (dweight, *[dbias] * (bias is not None), *[dx_bias] * (x_bias is not None))
    means, num_blocks = None, 1
    if _is_whole(num_columns):
        tile = _whole_tile(num_columns, "backward")
        stages, registers = BACKWARD_STAGES_AND_REGISTERS[tile["BLOCK"]]
    else:
        tile, stages, registers = BACKWARD_IN_BLOCKS, None, REGISTER_LIMIT
        num_blocks = -(-num_columns // tile["BLOCK"])
        means = torch.empty_like(statistics[:2])
        launch(
            _gradient_means_kernel, (num_rows,), *inputs, means, *scalars,
            HAS_DROPOUT=p > 0, BLOCK=ROW_IN_BLOCKS["BLOCK"], num_warps=4, maxnreg=REGISTER_LIMIT,
        )  # fmt: skip
    num_programs = min(max(1, count_programs(x.device) // num_blocks), -(-num_rows // tile["ROWS"]))
    partials = torch.empty((len(sums), num_programs, num_columns), dtype=torch.float32, device=x.device)
    launch(
        _layer_norm_backward_kernel, (num_programs, num_blocks), *inputs, means, *outputs, partials, *scalars,
        HAS_DROPOUT=p > 0, HAS_BIAS=bias is not None, **tile, STAGES=stages, num_warps=8, maxnreg=registers,
    )  # fmt: skip
    sum_partials(partials, sums)
    return gradients


@_layer_norm_backward.register_fake
def _allocate_backward(dy, x, residual, x_bias, weight, bias, seed, statistics, p):
    def empty_like(tensor):
        shape = (0,) if tensor is None else tensor.shape
        return torch.empty(shape, dtype=x.dtype if tensor is None else tensor.dtype, device=x.device)

    own_residual = residual if _has_own_dresidual(x, residual, p) else None
    return tuple(empty_like(tensor) for tensor in (x, own_residual, x_bias, weight, bias))


def _has_own_dresidual(x: torch.Tensor, residual: torch.Tensor | None, p: float) -> bool:
    """Whether the gradients of residual and x differ."""
    return residual is not None and (p > 0 or residual.dtype != x.dtype)


def _save_for_backward(ctx, inputs, output):
    x, residual, x_bias, weight, bias, seed, p, *_ = inputs
    _, *others = output
    statistics = others[0]
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, residual, x_bias, weight, bias, seed, statistics)
    ctx.p = p


def _backward(ctx, dy, *_):
    absent = (None,) * (len(ctx.needs_input_grad) - 5)  # of what has no gradient: seed, p, eps, and the bound
    if dy is None:
        return (None,) * 5 + absent
    saved = ctx.saved_tensors  # read once: activation checkpointing allows a single access
    dx, dresidual, dx_bias, dweight, dbias = _layer_norm_backward(dy, *saved, ctx.p)
    x, residual, x_bias, _, bias = saved[:5]
    if residual is None:
        dresidual = None
    elif not _has_own_dresidual(x, residual, ctx.p):
        dresidual = dx
    dx_bias = None if x_bias is None else dx_bias
    return dx, dresidual, dx_bias, dweight, None if bias is None else dbias, *absent


_layer_norm_forward.register_autograd(_backward, setup_context=_save_for_backward)
_layer_norm_forward_fp8.register_autograd(_backward, setup_context=_save_for_backward)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    impl: str | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., N), fp32, bf16 or fp16. weight, bias: (N,), fp32, bf16 or fp16; None for ones and zeros.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        (..., N) in the dtype of x.
    Raises:
        ValueError: mismatched shapes, dtypes or devices.
    """
    triton = use_triton("layer_norm", impl, x, weight, bias)
    _check("layer_norm", triton, x, {"weight": weight, "bias": bias})
    if triton:
        weight, bias = unify_dtypes(x, weight, bias)
        return _layer_norm_forward(x, None, None, _fill_in(x, weight, bias), bias, None, 0.0, eps)[0]
    return layer_norm_torch(x, weight, bias, eps)


def dropout_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    p: float = 0.0,
    eps: float = 1e-5,
    x_bias: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    bound: torch.Tensor | None = None,
    impl: str | None = None,
) -> Any:
    """LayerNorm(residual + dropout(x + x_bias)) over the last dimension.

    Args:
        x: (..., N), fp32, bf16 or fp16. residual: (..., N). weight, bias: as in `layer_norm`. x_bias: (N,).
        p: dropout probability, rounded to a multiple of 1/256; pass 0 outside training.
        seed: see `philox`; required if p > 0. A tensor may change between replays of a CUDA graph.
        bound: fp32 scalar tensor, at least the largest |y| (`fp8.bound_layer_norm`), to get y in 8 bits as well.
        impl: as in `layer_norm`.
    Returns:
        (..., N) in the dtype of x; with a bound, a pair of that and the same in 8 bits, a `fp8.Scaled`.
    Raises:
        ValueError: mismatched shapes, dtypes or devices, p outside [0, 1], or p > 0 without a seed.
    """
    triton = use_triton("dropout_add_layer_norm", impl, x, residual, weight, bias, x_bias)
    _check("dropout_add_layer_norm", triton, x, {"weight": weight, "bias": bias, "x_bias": x_bias}, residual)
    philox.dropout_threshold(p)
    if p > 0 and seed is None:
        raise ValueError("dropout_add_layer_norm: p > 0 needs a seed; pass seed=, an int or an int64 tensor")
    seed = philox.as_seed(seed, x.device) if p > 0 else None
    if triton:
        weight, bias, x_bias = unify_dtypes(x, weight, bias, x_bias)
        weight = _fill_in(x, weight, bias, x_bias)
        (residual,) = unify_dtypes(x, residual)
        arguments = (x, residual, x_bias, weight, bias, seed, p, eps)
        if bound is None:
            return _layer_norm_forward(*arguments)[0]
        y, _, *in_8_bits = _layer_norm_forward_fp8(*arguments, bound)
        return y, Scaled(*in_8_bits)
    y = dropout_add_layer_norm_torch(x, residual, weight, bias, p, eps, x_bias, seed)
    return y if bound is None else (y, cast_torch(y.detach(), bound))


def _fill_in(x: torch.Tensor, weight: torch.Tensor | None, *others: torch.Tensor | None) -> torch.Tensor:
    """The weight, or ones in the dtype of the other parameters: N elements, which spare the kernel a configuration."""
    if weight is not None:
        return weight
    like = next((vector for vector in others if vector is not None), x)
    return like.new_ones(x.shape[-1:])


def _check(
    operation: str,
    triton: bool,
    x: torch.Tensor,
    vectors: dict[str, torch.Tensor | None],
    residual: torch.Tensor | None = None,
) -> None:
    if x.dim() == 0:
        raise ValueError(f"{operation}: x is a scalar; it needs a dimension to normalise over")
    tensors = {"x": x, "residual": residual, **vectors}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape = x.shape[-1:] if name in vectors else x.shape
        if tensor.shape != shape:
            raise ValueError(f"{operation}: {name} is {tuple(tensor.shape)}, x is {tuple(x.shape)}; "
                             f"{name} must be {tuple(shape)}")  # fmt: skip
        if not tensor.dtype.is_floating_point or (triton and tensor.dtype not in KERNEL_DTYPES):
            raise ValueError(f"{operation}: {name} is {tensor.dtype}; use float32, bfloat16 or float16")


class LayerNorm(torch.nn.LayerNorm):
    """`layer_norm` as a module: `torch.nn.LayerNorm` over one dimension, with its arguments, parameters and state_dict."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"LayerNorm: normalized_shape is {normalized_shape}; it must be one dimension")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class DropoutAddLayerNorm(torch.nn.LayerNorm):
    """`dropout_add_layer_norm` as a module, with the parameters of `torch.nn.LayerNorm`. Drops in training mode only."""

    def __init__(
        self,
        hidden_size: int,
        p: float = 0.1,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, eps, elementwise_affine, bias, device, dtype)
        self.p = p

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        x_bias: torch.Tensor | None = None,
        seed: int | torch.Tensor | None = None,
        bound: torch.Tensor | None = None,
    ) -> Any:
        """See `dropout_add_layer_norm`. `seed` is required in training mode if p > 0."""
        return dropout_add_layer_norm(
            x, residual, self.weight, self.bias, p=self.p if self.training else 0.0, eps=self.eps, x_bias=x_bias,
            seed=seed, bound=bound,
        )  # fmt: skip
