"""Linear layer and cross-entropy in one operation that never holds all logits; RoBERTa's masked-language-model head.

For hidden states h (N, d), weight W (V, d), bias b (V,) and targets t (N,), with x = h W^T + b over the first C rows
of W (C = `num_classes`, by default V):

    lse_i  = log sum_c exp(x_ic)
    loss_i = lse_i - (1 - e) x_i,t_i - (e / C) sum_c x_ic + z lse_i^2      e: label smoothing, z: z-loss
    dx_ic  = (1 + 2 z lse_i) exp(x_ic - lse_i) - (1 - e) [c = t_i] - e / C

loss_i and dx_i are zero where t_i is `ignore_index`. Then dh = dx W, dW = dx^T h, db = sum_i dx_i. Rows of W from C on (a
vocabulary padded for aligned matrix products) get no probability and no gradient. Ignored rows of h and of W may hold
anything, NaN included. The z-loss is that of PaLM (Chowdhery
et al., arXiv 2204.02311, section 5). Label smoothing is that of torch.nn.CrossEntropyLoss.

Shapes and dtypes
    hidden (N, d) fp32, bf16 or fp16. weight and bias may be wider (fp32 masters); they are cast to hidden's dtype once.
    targets int64. Matrix products run in hidden's dtype. Softmax and loss are computed, and dW and db accumulated, in
    fp32. Each gradient has the dtype of its tensor. In PyTorch hidden may be fp64, which is then used throughout.

How memory stays small
    Rows are processed in chunks. One matrix product yields the logits of a chunk. A kernel with one program per row reads
    them once for lse (online softmax), the loss, and whether the target is the first argmax, then overwrites them with
    their gradient. Two more matrix products turn that into the chunk's dh and its part of dW. All this happens in the
    forward, where the upstream gradient g is not yet known. The backward only multiplies by g (and by 1/count for "mean")
    in fp32. dx is thus rounded at its natural scale of at most 1, and cannot underflow in fp16.
    A chunk has R = N/5 rows rounded up to a multiple of 128, but at least 1024 (below which reading and writing dW for
    every chunk takes about as long as its product) and at most 4096. Beyond inputs and gradients the peak is R rows of
    logits:
        N = 4928: R = 1024, 103 of 496 MB (21%);  N = 9856: R = 2048, 206 of 992 MB (21%);  N = 65536: R = 4096, 6%
    with V = 50304 in bf16, R d elements of its hidden states, and V d elements of a copy of the weight where an fp32
    weight meets bf16 hidden states or the vocabulary is padded.
    On a CPU a chunk has 512 rows, and ignored rows are left out before any product.

Saved for the backward: dh in hidden's dtype, dW and db in fp32 (on a CPU, dW of bf16 weights in bf16 if one chunk holds
all rows), and the inputs by reference. The first backward scales dW in place. A second one through a retained graph, and
any with reduction="none" (whose upstream gradient differs by row), recomputes the chunks.

Bytes moved, besides those of the matrix products: the logits are read once, read again from L2 and written once (4 bytes
per bf16 logit to and from HBM), and read once for db: 6 N V bytes, 1.5 GB for N = 4928. dW is read and written for every
chunk after the first.

Determinism: no atomics and a fixed order, so repeated runs give the same bits wherever matrix products do. No random
numbers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ._dispatch import (
    align,
    cast_for_autocast,
    is_traced,
    is_transforming,
    jit,
    launch,
    operator,
    tl,
    use_triton,
    without_autocast,
)
from ._rows import KERNEL_DTYPES
from .gelu import bias_gelu
from .layer_norm import layer_norm

REDUCTIONS = ("mean", "sum", "none")


class LinearCrossEntropyOutput(NamedTuple):
    """The result of `linear_cross_entropy`. The counts are int64 scalars on the device, without gradients."""

    loss: torch.Tensor
    num_correct: torch.Tensor
    num_targets: torch.Tensor


class Gradients(NamedTuple):
    """Gradients of the unscaled sum of losses. Those not requested are empty."""

    hidden: torch.Tensor  # (N, d), hidden's dtype
    weight: torch.Tensor  # (V, d) fp32 (fp64 for fp64), or as _empty_gradients says
    bias: torch.Tensor  # (V,) fp32 (fp64 for fp64)


# Sixteen rows of 50265 fp32 logits, and a 4096 x 768 part of dW, are about as large as a core's cache. Products of a
# multiple of sixteen rows were measured to take 20 to 30% less time than those of an odd number.
_ROWS_IN_CACHE = 16
_CLASSES_IN_CACHE = 4096
_CHUNK_ROWS_TORCH = 512
_FEW_LOGITS = 262_144  # up to here, what the steps of a chunk cost to call outweighs what they save


def _loss_and_gradients_torch(
    hidden, weight, bias, targets, row_gradient, ignore_index, label_smoothing, z_loss, num_classes, needs
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Losses (N,) fp32 (fp64 for fp64), correct (N,) bool, and gradients in PyTorch operations, chunk by chunk."""
    sum_dtype = _sum_dtype(hidden)
    num_rows, num_entries = hidden.shape[0], weight.shape[0]
    matrix = weight[:num_classes].to(hidden.dtype)
    matrix_bias = None if bias is None else bias[:num_classes].to(hidden.dtype)
    # Leave out ignored rows before any work is done.
    kept = (targets != ignore_index).nonzero().squeeze(1)
    loss = torch.zeros(num_rows, dtype=sum_dtype, device=hidden.device)
    correct = torch.zeros(num_rows, dtype=torch.bool, device=hidden.device)
    gradients = _empty_gradients(hidden, weight, needs, use_kernel=False)
    gradients.hidden.zero_()
    gradients.bias.zero_()
    d_matrix = gradients.weight[:num_classes]
    gradients.weight[num_classes if kept.numel() else 0 :].zero_()
    buffer = hidden.new_empty(_fill_up(min(_CHUNK_ROWS_TORCH, kept.numel())), num_entries)[:, :num_classes]
    for start in range(0, kept.numel(), _CHUNK_ROWS_TORCH):
        rows = kept[start : start + _CHUNK_ROWS_TORCH]
        chunk = F.pad(hidden[rows], (0, 0, 0, _fill_up(rows.numel()) - rows.numel()))
        logits = buffer[: chunk.shape[0]]
        if matrix_bias is None:
            torch.mm(chunk, matrix.T, out=logits)
        else:
            torch.addmm(matrix_bias, chunk, matrix.T, out=logits)
        block_sums = []
        for first in range(0, rows.numel(), _ROWS_IN_CACHE):
            block = slice(first, min(first + _ROWS_IN_CACHE, rows.numel()))
            x = logits[block].to(sum_dtype)
            target = targets[rows[block], None]
            x_target = x.gather(1, target)
            largest = x.amax(1, keepdim=True)
            probability = torch.softmax(x, 1)
            # The largest probability is exp(0) divided by the sum of exponentials.
            lse = largest - probability.amax(1, keepdim=True).log()
            row_loss = lse - x_target
            if label_smoothing:
                row_loss += label_smoothing * (x_target - x.mean(1, keepdim=True))
            loss[rows[block]] = (row_loss + z_loss * lse.square()).squeeze(1)
            # argmax is slow, and only needed to tell a hit from a tie.
            hits = (x_target == largest).squeeze(1).nonzero().squeeze(1)
            if hits.numel():
                correct[rows[block][hits]] = x[hits].argmax(1) == target[hits, 0]
            if any(needs):
                scale = 1.0 if row_gradient is None else row_gradient[rows[block], None]
                if z_loss or row_gradient is not None:
                    probability *= scale * (1 + 2 * z_loss * lse)
                if label_smoothing:
                    probability -= scale * (label_smoothing / num_classes)
                probability.scatter_add_(1, target, (-scale * (1 - label_smoothing)) * torch.ones_like(x_target))
                logits[block] = probability
                if needs[2]:
                    block_sums.append(probability.sum(0))
        logits[rows.numel() :] = 0  # padding rows hold the bias; an entry of -inf times zero would be NaN in dW
        if needs[2]:
            gradients.bias[:num_classes] += torch.stack(block_sums).sum(0)
        if needs[0]:
            gradients.hidden[rows] = torch.mm(logits, matrix)[: rows.numel()]
        if needs[1] and d_matrix.dtype == hidden.dtype:
            if start == 0:
                torch.mm(logits.T, chunk, out=d_matrix)
            else:
                torch.addmm(d_matrix, logits.T, chunk, out=d_matrix)
        elif needs[1]:
            for first in range(0, num_classes, _CLASSES_IN_CACHE):
                part = slice(first, first + _CLASSES_IN_CACHE)
                product = torch.mm(logits[:, part].T, chunk)
                d_matrix[part].copy_(product) if start == 0 else d_matrix[part].add_(product)
    return loss, correct, gradients


def _fill_up(num_rows: int) -> int:
    return -(-num_rows // _ROWS_IN_CACHE) * _ROWS_IN_CACHE


def _sum_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of the softmax, the loss, and the gradients of weight and bias."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _empty_gradients(hidden, weight, needs: list[bool], use_kernel: bool) -> Gradients:
    (num_rows, width), num_entries = hidden.shape, weight.shape[0]
    weight_dtype = _sum_dtype(hidden)
    if not use_kernel and hidden.dtype == weight.dtype == torch.bfloat16 and num_rows <= _CHUNK_ROWS_TORCH:
        weight_dtype = torch.bfloat16  # a single product is rounded once; nothing is accumulated
    return Gradients(
        hidden.new_empty((num_rows, width) if needs[0] else (0,)),
        hidden.new_empty((num_entries, width) if needs[1] else (0,), dtype=weight_dtype),
        hidden.new_empty((num_entries,) if needs[2] else (0,), dtype=_sum_dtype(hidden)),
    )


# Of the sizes, only the stride affects how memory is read, and it is always a multiple of 64.
@jit(do_not_specialize=["num_classes", "ignore_index"])
def _softmax_rows_kernel(
    logits_ptr,  # (rows, row_stride): overwritten by the gradient
    row_stride,
    targets_ptr,  # (rows,) int64
    loss_ptr,  # (rows,) fp32
    correct_ptr,  # (rows,) int32
    row_gradient_ptr,  # (rows,) fp32
    num_classes,
    ignore_index,
    label_smoothing,
    z_loss,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SMOOTH: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    num_steps = tl.cdiv(row_stride, LANES * VECTOR)
    target = tl.load(targets_ptr + row)
    # Each lane keeps its own maximum and sum over vectors of neighbouring columns: one rescaling per vector, and no
    # exchange between lanes until the end. Rows are padded to whole vectors, so classes are masked after the load.
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if WRITE_GRADIENT:
            zeros = tl.zeros((LANES, VECTOR), dtype=logits_ptr.dtype.element_ty)
            for step in range(num_steps):
                column = step * LANES * VECTOR + columns
                tl.store(logits_ptr + column, zeros, mask=column < row_stride)
    else:
        # Raising an error for a target that is no class would wait for the device. Its loss is NaN instead.
        in_range = (target >= 0) & (target < num_classes)
        x_target = tl.load(logits_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
        lane_max = tl.full((LANES,), -2.0e38, dtype=tl.float32)  # finite: a lane may see no class
        lane_sum = tl.zeros((LANES,), dtype=tl.float32)
        lane_total = tl.zeros((LANES,), dtype=tl.float32)
        lane_beaten = tl.zeros((LANES,), dtype=tl.int32)
        for step in range(num_steps):
            column = step * LANES * VECTOR + columns
            x = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0).to(tl.float32)
            x = tl.where(column < num_classes, x, -float("inf"))
            new_max = tl.maximum(lane_max, tl.max(x, axis=1))
            exponentials = tl.exp2((x - new_max[:, None]) * LOG2_E)
            lane_sum = lane_sum * tl.exp2((lane_max - new_max) * LOG2_E) + tl.sum(exponentials, axis=1)
            lane_max = new_max
            # The target is the first argmax unless some logit is larger, or equal and earlier.
            beats = (x > x_target) | ((x == x_target) & (column < target))
            lane_beaten = tl.maximum(lane_beaten, tl.max(beats.to(tl.int32), axis=1))
            if SMOOTH:
                lane_total += tl.sum(tl.where(column < num_classes, x, 0.0), axis=1)
        largest = tl.max(lane_max, axis=0)
        total = tl.sum(lane_sum * tl.exp2((lane_max - largest) * LOG2_E), axis=0)
        log_total = tl.log(total)
        lse = largest + log_total
        loss = (largest - x_target) + log_total + z_loss * lse * lse
        if SMOOTH:
            loss += label_smoothing * (x_target - tl.sum(lane_total, axis=0) / num_classes)
        tl.store(loss_ptr + row, loss)
        tl.store(correct_ptr + row, (1 - tl.max(lane_beaten, axis=0)) * (x_target == x_target).to(tl.int32))
        if WRITE_GRADIENT:
            scale = tl.load(row_gradient_ptr + row)
            # exp(x - lse) would carry the rounding error of lse into every probability.
            of_exponential = scale * (1.0 + 2.0 * z_loss * lse) / total
            of_target = scale
            if SMOOTH:
                of_target = scale * (1.0 - label_smoothing)
                of_all = scale * label_smoothing / num_classes
            for step in range(num_steps):
                column = step * LANES * VECTOR + columns
                x = tl.load(logits_ptr + column, mask=column < row_stride, other=0.0).to(tl.float32)
                x = tl.where(column < num_classes, x, -float("inf"))
                gradient = of_exponential * tl.exp2((x - largest) * LOG2_E)
                gradient = tl.where(column == target, gradient - of_target, gradient)
                if SMOOTH:
                    gradient -= of_all
                gradient = tl.where(column < num_classes, gradient, 0.0)
                tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < row_stride)


def _chunk_rows(num_rows: int) -> int:
    """Rows of logits that exist at a time; see the arithmetic at the top of this file."""
    return min(4096, max(1024, -(-num_rows // (5 * 128)) * 128))


def _accumulate_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """total (fp32) = left @ right if `first`, else total += left @ right, accumulated in fp32."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else torch.addmm(total, left, right, out=total)
    elif not total.is_cuda:  # the interpreter; ATen supports products with a wider output on CUDA only
        _accumulate_product(total, left.float(), right.float(), first)
    elif first:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _loss_and_gradients_triton(
    hidden, weight, bias, targets, row_gradient, ignore_index, label_smoothing, z_loss, num_classes, needs
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Losses (N,) fp32, correct (N,) int32, and gradients, with the Triton kernel between matrix products."""
    num_rows, num_entries = hidden.shape[0], weight.shape[0]
    hidden, targets = hidden.contiguous(), align(targets)
    # Zeros where the gradient of the logits is zero: zero times NaN or infinity would be NaN.
    ignored = (targets == ignore_index)[:, None]
    matrix = weight.to(hidden.dtype).contiguous()
    if num_classes < num_entries:
        matrix = matrix.clone() if matrix is weight else matrix
        matrix[num_classes:] = 0
    matrix_bias = None if bias is None else bias.to(hidden.dtype).contiguous()
    loss = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    if row_gradient is None:
        row_gradient = torch.ones_like(loss)
    gradients = _empty_gradients(hidden, weight, needs, use_kernel=True)
    if num_rows == 0:
        gradients.weight.zero_()
        gradients.bias.zero_()
    # Rows start at multiples of 128 bytes, which makes both matrix products and the kernel's vector loads fast.
    row_stride = -(-num_entries // 64) * 64
    lanes, vector = 512, 16 // hidden.element_size()  # one 16-byte load per thread and step
    chunk_rows = min(_chunk_rows(num_rows), num_rows)
    buffer = hidden.new_empty(chunk_rows, row_stride)
    for start in range(0, num_rows, max(1, chunk_rows)):
        rows = slice(start, min(start + chunk_rows, num_rows))
        chunk = hidden[rows].masked_fill(ignored[rows], 0)
        logits = buffer[: rows.stop - start, :num_entries]
        if matrix_bias is None:
            torch.mm(chunk, matrix.T, out=logits)
        else:
            torch.addmm(matrix_bias, chunk, matrix.T, out=logits)
        launch(
            _softmax_rows_kernel,
            (rows.stop - start,),
            logits,
            row_stride,
            targets[rows],
            loss[rows],
            correct[rows],
            row_gradient[rows],
            num_classes,
            ignore_index,
            label_smoothing,
            z_loss,
            LANES=lanes,
            VECTOR=vector,
            SMOOTH=label_smoothing != 0,
            WRITE_GRADIENT=any(needs),
            num_warps=16,
            num_stages=2,
        )
        if needs[0]:
            torch.mm(logits, matrix, out=gradients.hidden[rows])
        if needs[1]:
            _accumulate_product(gradients.weight, logits.T, chunk, first=start == 0)
        if needs[2]:
            column_sums = logits.sum(0, dtype=torch.float32)
            gradients.bias.copy_(column_sums) if start == 0 else gradients.bias.add_(column_sums)
    return loss, correct, gradients


def _check_targets(targets: torch.Tensor, ignore_index: int, num_classes: int) -> None:
    if targets.device.type != "cpu":
        return  # checking would wait for the device
    bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= num_classes))]
    if bad.numel():
        raise ValueError(
            f"linear_cross_entropy: target {bad[0].item()} is outside the {num_classes} classes; correct it, or set the "
            f"targets of rows to skip to ignore_index={ignore_index}"
        )


@operator("linear_cross_entropy_forward")
@without_autocast
def _forward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    num_classes: int,
    reduction: str,
    needs: list[bool],
    consume: bool,
    use_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, number correct, number of targets, and the gradients of the summed loss for hidden, weight and bias.

    `consume` lets the backward scale the returned gradients in place, which saves a second dW. It is for callers that do
    not use them.
    """
    _check_targets(targets, ignore_index, num_classes)
    run = _loss_and_gradients_triton if use_kernel else _loss_and_gradients_torch
    in_backward = reduction == "none"  # the upstream gradients of rows are known only there
    loss, correct, gradients = run(
        hidden,
        weight,
        bias,
        targets,
        None,
        ignore_index,
        label_smoothing,
        z_loss,
        num_classes,
        [need and not in_backward for need in needs],
    )
    num_targets = (targets != ignore_index).sum()
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / num_targets.clamp(min=1)
    return loss, correct.sum(), num_targets, *gradients


@_forward_op.register_fake
def _(
    hidden, weight, bias, targets, ignore_index, label_smoothing, z_loss, num_classes, reduction, needs, consume,
    use_kernel,
):  # fmt: skip
    needs = [need and reduction != "none" for need in needs]
    loss = hidden.new_empty(hidden.shape[:1] if reduction == "none" else (), dtype=_sum_dtype(hidden))
    counts = [targets.new_empty((), dtype=torch.int64) for _ in range(2)]
    return loss, *counts, *_empty_gradients(hidden, weight, needs, use_kernel)


@operator("linear_cross_entropy_backward")
@without_autocast
def _backward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_gradient: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    num_classes: int,
    needs: list[bool],
    use_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Recompute the gradients, with the loss of each row weighted by `row_gradient` (N,) if given."""
    run = _loss_and_gradients_triton if use_kernel else _loss_and_gradients_torch
    if row_gradient is not None:
        row_gradient = align(row_gradient.to(_sum_dtype(hidden)))
    arguments = (hidden, weight, bias, targets, row_gradient, ignore_index, label_smoothing, z_loss, num_classes, needs)
    d_hidden, d_weight, d_bias = run(*arguments)[2]
    return d_hidden, d_weight, d_bias


@_backward_op.register_fake
def _(
    hidden, weight, bias, targets, row_gradient, ignore_index, label_smoothing, z_loss, num_classes, needs, use_kernel
):
    return tuple(_empty_gradients(hidden, weight, needs, use_kernel))


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, *ctx.settings, ctx.reduction, ctx.needs, ctx.consume, ctx.use_kernel = inputs
    _, num_correct, num_targets, *gradients = output
    ctx.save_for_backward(hidden, weight, bias, targets, num_targets)
    ctx.mark_non_differentiable(num_correct, num_targets, *gradients)
    ctx.set_materialize_grads(False)
    # Not saved tensors, since the first backward scales them in place and drops them.
    ctx.gradients = None if ctx.reduction == "none" else gradients


def _backward(ctx, loss_gradient, *_):
    if loss_gradient is None:
        return (None,) * 12
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy: the backward cannot be differentiated; drop create_graph=True")
    hidden, weight, bias, targets, num_targets = ctx.saved_tensors
    gradients, ctx.gradients = ctx.gradients, None
    per_row = ctx.reduction == "none"
    if gradients is None:
        gradients = _backward_op(
            hidden,
            weight,
            bias,
            targets,
            loss_gradient if per_row else None,
            *ctx.settings,
            ctx.needs,
            ctx.use_kernel,
        )
    scale = None if per_row else loss_gradient
    if ctx.reduction == "mean":
        scale = scale / num_targets.clamp(min=1)
    if scale is not None and hidden.is_cuda:
        # With one dimension it stays fp32. CUDA, unlike a CPU, would round a scalar tensor to bf16 before multiplying.
        scale = scale.reshape(1)
    results = []
    for gradient, tensor, need in zip(gradients, (hidden, weight, bias), ctx.needs):
        if not need:
            results.append(None)
            continue
        if scale is not None:
            in_place = ctx.consume and (gradient.dtype == torch.float32 or not hidden.is_cuda)
            gradient = gradient.mul_(scale) if in_place else gradient * scale
        results.append(gradient.to(tensor.dtype))
    return *results, *(None,) * 9


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _compute_whole(
    hidden, weight, bias, targets, ignore_index, label_smoothing, z_loss, reduction, num_classes
) -> LinearCrossEntropyOutput:
    """All logits at once in PyTorch's own operations: for few of them, and for torch.func, which sees into no other."""
    shape, targets = targets.shape, targets.flatten().long()
    kept = targets != ignore_index
    hidden = hidden.reshape(targets.numel(), hidden.shape[-1])
    if is_traced() or not kept.all():
        hidden = hidden.masked_fill(~kept[:, None], 0.0)  # ignored rows may hold NaN
    weight, bias = (None if tensor is None else tensor[:num_classes].to(hidden.dtype) for tensor in (weight, bias))
    x = F.linear(hidden, weight, bias).to(_sum_dtype(hidden))
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(x, targets, reduction="none" if reduction == "none" or z_loss else "sum", **options)
    if z_loss:
        loss = loss + z_loss * (x.logsumexp(1) * kept).square()
    num_targets = kept.sum()
    if reduction == "none":
        loss = loss.view(shape)
    elif z_loss:
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / num_targets.clamp(min=1)
    return LinearCrossEntropyOutput(loss, ((x.argmax(1) == targets) & kept).sum(), num_targets)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_classes: int | None = None,
    impl: str | None = None,
) -> LinearCrossEntropyOutput:
    """Cross-entropy of `hidden @ weight.T + bias` and `targets`, one chunk of rows at a time.

    Args:
        hidden: (..., d), fp32, bf16 or fp16. Under autocast it is cast as for a linear layer.
        weight: (V, d), in hidden's dtype or wider. bias: (V,) or None.
        targets: int64 or int32, one for each row of hidden: a class in [0, num_classes), or `ignore_index` for rows
            without loss or gradient.
        label_smoothing: the probability spread evenly over all classes, in [0, 1).
        z_loss: weight of the squared log of the softmax's denominator.
        reduction: "mean" over rows that are not ignored (zero, not NaN, if there are none), "sum", or "none", which
            computes the logits again in the backward.
        num_classes: how many rows of weight are classes; the others are padding. By default all of them.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch". With None on a CPU, up to 262,144 logits, unless
            in fp16, go through torch.nn.functional.cross_entropy at once; inside transforms of torch.func, any number.
    Returns:
        loss: fp32 (fp64 for fp64), () or the shape of targets. num_correct: rows whose target is the first largest logit.
        num_targets: rows that are not ignored.
    Raises:
        ValueError: mismatched shapes, dtypes, devices or settings; on a CPU a target that is no class. On CUDA, where
            checking would wait for the device, the loss is then NaN.
    """
    name = "linear_cross_entropy"
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: expected hidden (..., d) and weight (V, d), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},), one entry per row of weight"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: targets are {tuple(targets.shape)} {targets.dtype}, expected int64 or int32 "
            f"{tuple(hidden.shape[:-1])}, one per row of hidden"
        )
    if num_classes is None:
        num_classes = weight.shape[0]
    if not 1 <= num_classes <= weight.shape[0]:
        raise ValueError(f"{name}: num_classes={num_classes} is outside 1 to {weight.shape[0]}, the rows of weight")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing < 1.0 or z_loss < 0.0:
        raise ValueError(
            f"{name}: label_smoothing={label_smoothing} and z_loss={z_loss}, expected 0 <= label_smoothing < 1 and "
            "z_loss >= 0"
        )
    use_kernel = use_triton(name, impl, hidden, weight, bias, targets)
    if not hidden.dtype.is_floating_point or (use_kernel and hidden.dtype not in KERNEL_DTYPES):
        raise ValueError(
            f"{name}: hidden is {hidden.dtype}; use float32, bfloat16 or float16, or float64 with impl='torch'"
        )
    (hidden,) = cast_for_autocast(hidden)
    is_small = impl is None and not torch.compiler.is_compiling() and targets.numel() * num_classes <= _FEW_LOGITS
    may_underflow = hidden.dtype == torch.float16  # the gradient of the logits, scaled by that of the mean
    if is_transforming() or (is_small and not use_kernel and not may_underflow):
        settings = ignore_index, label_smoothing, z_loss, reduction, num_classes
        try:
            return _compute_whole(hidden, weight, bias, targets, *settings)
        except IndexError:
            _check_targets(targets, ignore_index, num_classes)
            raise
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    ]
    loss, num_correct, num_targets, *_ = _forward_op(
        hidden.reshape(targets.numel(), hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(targets.numel()).long(),
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        num_classes,
        reduction,
        needs,
        True,
        use_kernel,
    )
    if reduction == "none":
        loss = loss.view(targets.shape)
    return LinearCrossEntropyOutput(loss, num_correct, num_targets)


# In PyTorch operations, on any device; tuned for CPUs.
linear_cross_entropy_torch = functools.partial(linear_cross_entropy, impl="torch")

# Hugging Face's `hidden_act` -> form of GELU.
_APPROXIMATE = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class MaskedLMHead(torch.nn.Module):
    """RoBERTa's head for masked tokens only: gather, dense, GELU, LayerNorm, tied decoder, loss.

    Parameters have the names of Hugging Face's `lm_head`: dense.weight, dense.bias, layer_norm.weight, layer_norm.bias,
    bias. The decoder's weight is the word embedding and is passed in. Parameters may be fp32 while hidden states are bf16
    or fp16: matrix products cast them.

    Args:
        vocab_size: rows of the decoder's weight, padding included.
        hidden_act: "gelu" (erf), or "gelu_new" or "gelu_pytorch_tanh" (tanh approximation).
        bias: False leaves out all three biases, the decoder's included.
    Raises:
        ValueError: an unknown hidden_act.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        layer_norm_eps: float = 1e-5,
        hidden_act: str = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_act not in _APPROXIMATE:
            raise ValueError(f"MaskedLMHead: hidden_act={hidden_act!r} is unknown; use {', '.join(_APPROXIMATE)}")
        self.approximate = _APPROXIMATE[hidden_act]
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.vocab_size = vocab_size
        self.dense = torch.nn.Linear(hidden_size, hidden_size, **options)
        self.layer_norm = torch.nn.LayerNorm(hidden_size, eps=layer_norm_eps, **options)
        self.bias = torch.nn.Parameter(torch.zeros(vocab_size, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        self.dense.reset_parameters()
        self.layer_norm.reset_parameters()
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, approximate={self.approximate!r}, bias={self.bias is not None}"

    def transform(self, hidden: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
        """What the decoder multiplies, (N, d), from hidden states (N, d): dense, GELU, LayerNorm."""
        product = F.linear(hidden, self.dense.weight.to(hidden.dtype))
        activated = bias_gelu(product, self.dense.bias, approximate=self.approximate, impl=impl)
        norm = self.layer_norm
        return layer_norm(activated, norm.weight, norm.bias, eps=norm.eps, impl=impl)

    def forward(
        self,
        hidden: torch.Tensor,
        decoder_weight: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        reduction: str = "sum",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        num_classes: int | None = None,
        impl: str | None = None,
    ) -> LinearCrossEntropyOutput:
        """Loss and counts over the labels that are not -100.

        Args:
            hidden: (B, L, d) with `positions`, otherwise (..., d), one row per label.
            decoder_weight: (vocab_size, d). labels: int64, (B, K) or the leading shape of hidden; -100 means no loss.
            positions: int64 (B, K), in [0, L): the position of each label in its sequence. Unused slots may hold any
                position, with label -100.
            For the others see `linear_cross_entropy`.
        Raises:
            ValueError: positions do not match labels or hidden, or on a CPU lie outside the sequence; or as in
                `linear_cross_entropy`.
        """
        if positions is not None:
            if hidden.dim() != 3 or positions.shape != labels.shape or positions.shape[:1] != hidden.shape[:1]:
                raise ValueError(
                    f"MaskedLMHead: hidden {tuple(hidden.shape)}, positions {tuple(positions.shape)} and labels "
                    f"{tuple(labels.shape)} do not match; expected (B, L, d), (B, K) and (B, K)"
                )
            num_sequences, length, _ = hidden.shape
            if positions.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transforming():
                outside = positions[(positions < 0) | (positions >= length)]
                if outside.numel():
                    raise ValueError(
                        f"MaskedLMHead: position {outside[0].item()} is outside the {length} of a sequence"
                    )
            first_rows = torch.arange(num_sequences, device=hidden.device)[:, None] * length
            hidden = hidden.flatten(0, 1).index_select(0, (first_rows + positions).flatten())
        # Ignored rows may hold anything; in the sums over rows of a gradient, zero times NaN would be NaN.
        hidden = hidden.masked_fill((labels == -100).view(*hidden.shape[:-1], 1), 0.0)
        return linear_cross_entropy(
            self.transform(hidden.flatten(0, -2), impl=impl),
            decoder_weight,
            self.bias,
            labels.flatten(),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            num_classes=num_classes,
            impl=impl,
        )

    def logits(
        self,
        hidden: torch.Tensor,
        decoder_weight: torch.Tensor,
        num_classes: int | None = None,
        *,
        impl: str | None = None,
    ) -> torch.Tensor:
        """All logits (..., num_classes) of hidden states (..., d), for inference."""
        weight = decoder_weight[:num_classes].to(hidden.dtype)
        bias = None if self.bias is None else self.bias[:num_classes].to(hidden.dtype)
        return F.linear(self.transform(hidden, impl=impl), weight, bias)
