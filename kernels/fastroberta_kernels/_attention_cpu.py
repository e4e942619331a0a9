"""Attention in PyTorch operations, tuned for CPUs: what `impl="torch"` runs, on any device.

The forward computes the softmax by its definition and saves its probabilities, so the backward needs no exponentials.
Work is split into pieces, some heads of a sequence or some whole sequences, whose scores stay in a core's cache. Without
dropout and without a backward in a narrow dtype, `torch.nn.functional.scaled_dot_product_attention` does the work.

Saved: Q, K, V, and one probability for each head, query and key in the dtype of Q; its sign is the dropout decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import philox
from ._dispatch import is_transforming, operator, without_autocast

# Scores of a piece, per thread: they and their derivatives stay in a core's cache, and each thread has a head of its own
# in the matrix products.
SCORES_AT_ONCE = 262_144
FEW_SCORES = 16_384
NO_TRANSFORM = "{}: torch.func cannot transform this call; use {} inside its transforms"


def attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout_p: float,
    scale: float,
    seed: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
) -> torch.Tensor:
    """`attention` in PyTorch operations; `seed` is as `philox.as_seed` returns it."""
    # Without dropout ATen's fused attention is as fast and saves no probabilities, but in narrow dtypes its backward takes
    # up to 2.5 times as long, unless there is next to nothing to compute.
    is_narrow = q.dtype in (torch.bfloat16, torch.float16)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    may_look = q.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transforming()
    is_small = may_look and q.shape[:3].numel() * k.shape[1] <= FEW_SCORES
    if is_transforming() and dropout_p > 0:
        raise ValueError(NO_TRANSFORM.format("attention", "dropout_p=0"))
    if dropout_p > 0 or (is_narrow and needs_gradient and not is_small and not is_transforming()):
        return attention_torch_forward(q, k, v, None, key_lengths, seed, q.shape[1], k.shape[1], dropout_p, scale)[0]
    mask = has_keys = None
    if key_lengths is not None and may_look:
        # The host may read the lengths: padding is cut off, which halves the time of a mask over half-empty sequences.
        lengths = key_lengths.tolist()
        if any(length < k.shape[1] for length in lengths):
            return attend_each_sequence(q, k, v, lengths, scale)
    elif key_lengths is not None:
        # What is ignored is set to zero, as zero times NaN or infinity would be NaN. A softmax over no keys is undefined: a
        # sequence without keys attends to all of them, and its output is then zeroed.
        is_key = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
        has_keys = (key_lengths > 0)[:, None, None, None]
        k, v = (tensor.masked_fill(~is_key[:, :, None, None], 0.0) for tensor in (k, v))
        q = q.masked_fill(~has_keys, 0.0)
        mask = is_key[:, None, None] | ~has_keys
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    ).transpose(1, 2)
    return out if has_keys is None else torch.where(has_keys, out, 0.0)


def attend_each_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """Attention without dropout, one sequence after the other, each with its own number of keys."""
    outputs = []
    for q_lhe, k_lhe, v_lhe, length in zip(q.unbind(0), k.unbind(0), v.unbind(0), lengths):
        q_hle, k_hle, v_hle = (t.transpose(0, 1) for t in (q_lhe, k_lhe[: max(0, length)], v_lhe[: max(0, length)]))
        if length > 0:
            outputs.append(F.scaled_dot_product_attention(q_hle[None], k_hle[None], v_hle[None], scale=scale)[0])
        else:  # zero, with a gradient of zero
            outputs.append(q_hle.masked_fill(torch.ones((), dtype=torch.bool), 0.0))
    return torch.stack(outputs).transpose(1, 2)


def read_bounds(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, totals: tuple[int, int], longest: tuple[int, int] | None
) -> tuple[list[int], list[int]]:
    """The bounds of packed queries and keys, checked against the number of rows and the longest document allowed."""
    bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, starts, total, most in zip("qk", bounds, totals, longest or totals):
        if starts[0] < 0 or starts[-1] > total or starts != sorted(starts):
            raise ValueError(
                f"varlen_attention: cu_seqlens_{name} must ascend from 0 to at most {total}, the number of rows; got "
                f"{starts}"
            )
        if (length := max(map(int.__sub__, starts[1:], starts), default=0)) > most:
            raise ValueError(
                f"varlen_attention: a document has {length} rows, more than max_seqlen_{name}={most}; pass the length of "
                "the longest"
            )
    return bounds


def list_pieces(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    longest: tuple[int, int] | None = None,
) -> Iterator[tuple[slice, slice, slice, tuple[int, int, int, int]]]:
    """Split the work into pieces whose scores fit in a core's cache: some heads of a sequence, or some whole sequences.

    Sequences without queries or keys are left out. Lengths are read on the host, and bounds of documents are checked.

    Yields:
        The query rows and key rows of a piece in the flattened batch, its heads, and the shape of its scores:
        (sequences, heads, queries, keys).
    """
    num_heads = q.shape[-2]
    scores_at_once = SCORES_AT_ONCE * torch.get_num_threads()
    if cu_seqlens_q is None and lengths_k is None:
        batch, num_q, num_k = q.shape[0], q.shape[1], k.shape[1]
        at_once = max(1, scores_at_once // max(1, num_heads * num_q * num_k))
        bounds = [(b, min(b + at_once, batch)) for b in range(0, batch, at_once)]
        sequences = [(b0 * num_q, b1 * num_q, b0 * num_k, b1 * num_k, b1 - b0) for b0, b1 in bounds]
    elif cu_seqlens_q is None:
        batch, num_q, num_k = q.shape[0], q.shape[1], k.shape[1]
        lengths = lengths_k.clamp(0, num_k).tolist()
        sequences = [(b * num_q, (b + 1) * num_q, b * num_k, b * num_k + length, 1) for b, length in enumerate(lengths)]
    else:
        starts_q, starts_k = read_bounds(cu_seqlens_q, lengths_k, (q.shape[0], k.shape[0]), longest)
        sequences = [(*bounds, 1) for bounds in zip(starts_q, starts_q[1:], starts_k, starts_k[1:])]
    for q0, q1, k0, k1, count in sequences:
        num_q, num_k = (q1 - q0) // count, (k1 - k0) // count
        if num_q <= 0 or num_k <= 0:
            continue
        step = num_heads if count > 1 else max(1, scores_at_once // (num_q * num_k))
        for first in range(0, num_heads, step):
            last = min(first + step, num_heads)
            yield slice(q0, q1), slice(k0, k1), slice(first, last), (count, last - first, num_q, num_k)


def take_piece(tensor_thd: torch.Tensor, rows: slice, heads: slice, count: int) -> torch.Tensor:
    """Take rows and heads of (tokens, heads, head_dim) as `count` sequences: (count * heads, length, head_dim)."""
    return tensor_thd[rows, heads].unflatten(0, (count, -1)).transpose(1, 2).flatten(0, 1)


def put_piece(tensor_thd: torch.Tensor, rows: slice, heads: slice, count: int, piece: torch.Tensor) -> None:
    """The inverse of `take_piece`."""
    tensor_thd[rows, heads].unflatten(0, (count, -1)).copy_(piece.unflatten(0, (count, -1)).transpose(1, 2))


@operator("attention_torch_forward")
@without_autocast
def attention_torch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the probabilities saved for the backward. Dropped probabilities are stored with a negative sign."""
    out = q.new_zeros(q.shape)
    q_thd, k_thd, v_thd, out_thd = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (q, k, v, out))
    num_heads = q_thd.shape[1]
    saved = q.new_empty(num_heads * q_thd.shape[0] * max_seqlen_k)
    statistics_dtype = torch.promote_types(q.dtype, torch.float32)
    nothing = q.new_empty((), dtype=statistics_dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[q.element_size()]
    keep_scale, longest = philox.dropout_scale(dropout_p), (max_seqlen_q, max_seqlen_k)
    used = 0
    for rows, columns, heads, shape in list_pieces(q, k, cu_seqlens_q, lengths_k, longest):
        count, _, num_q, num_k = shape
        if seed is not None and heads.start == 0:  # for all heads of these sequences
            rows_seed = torch.stack((seed[0], seed[1] + rows.start))
            keep = philox.dropout_keep_torch(rows_seed, dropout_p, count * num_q, num_k, num_heads)
            keep = keep.view(torch.int8).unflatten(0, (count, num_q)).transpose(1, 2)
        q_hqd = take_piece(q_thd, rows, heads, count).to(statistics_dtype)
        k_hkd = take_piece(k_thd, columns, heads, count).to(statistics_dtype)
        v_hkd = take_piece(v_thd, columns, heads, count)
        scores = torch.baddbmm(nothing, q_hqd, k_hkd.transpose(1, 2), beta=0, alpha=scale)
        torch.softmax(scores, -1, out=scores)
        kept = saved[used : used + scores.numel()].view(scores.shape)
        used += scores.numel()
        kept.copy_(scores)
        if seed is None:
            out_hqd = torch.bmm(kept, v_hkd)
        else:
            # Set the sign bit of what is dropped. Arithmetic on mixed integers and floats would be several times slower.
            dropped = keep[:, heads].to(bits).sub_(1).bitwise_and_(torch.iinfo(bits).min)
            kept.view(bits).view(shape).bitwise_or_(dropped)
            out_hqd = torch.bmm(kept.relu(), v_hkd).mul_(keep_scale)
        put_piece(out_thd, rows, heads, count, out_hqd)
    return out, saved


@attention_torch_forward.register_fake
def _(q, k, v, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale):
    return q.new_empty(q.shape), q.new_empty(q.numel() // q.shape[-1] * max_seqlen_k)


@operator("attention_torch_backward")
@without_autocast
def attention_torch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the queries, keys and values."""
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad_thd, q_thd, k_thd, v_thd, dq_thd, dk_thd, dv_thd = (
        tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (grad, q, k, v, dq, dk, dv)
    )
    keep_scale = philox.dropout_scale(dropout_p)
    nothing = q.new_empty(())
    used = 0
    for rows, columns, heads, (count, *sizes) in list_pieces(q, k, cu_seqlens_q, lengths_k):
        size = count * math.prod(sizes)
        probabilities = saved[used : used + size].view(-1, *sizes[1:])
        used += size
        grad_hqd, q_hqd = (take_piece(tensor, rows, heads, count) for tensor in (grad_thd, q_thd))
        k_hkd, v_hkd = (take_piece(tensor, columns, heads, count) for tensor in (k_thd, v_thd))
        dprobabilities = torch.baddbmm(nothing, grad_hqd, v_hkd.transpose(1, 2), beta=0, alpha=keep_scale)
        if dropout_p > 0:
            kept = probabilities.relu()
            # The derivative of relu passes a gradient where its input is positive, which is where dropout kept it.
            dprobabilities = torch.ops.aten.threshold_backward(dprobabilities, probabilities, 0)
            probabilities = probabilities.abs()
        else:
            kept = probabilities
        dv_hkd = torch.baddbmm(nothing, kept.transpose(1, 2), grad_hqd, beta=0, alpha=keep_scale)
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, q.dtype)
        put_piece(dq_thd, rows, heads, count, torch.baddbmm(nothing, dscores, k_hkd, beta=0, alpha=scale))
        dk_hkd = torch.baddbmm(nothing, dscores.transpose(1, 2), q_hqd, beta=0, alpha=scale)
        put_piece(dk_thd, columns, heads, count, dk_hkd)
        put_piece(dv_thd, columns, heads, count, dv_hkd)
    return dq, dk, dv


@attention_torch_backward.register_fake
def _(grad, q, k, v, saved, cu_seqlens_q, lengths_k, dropout_p, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save_for_torch_backward(ctx, inputs, output):
    q, k, v, cu_seqlens_q, lengths_k, _, _, _, ctx.dropout_p, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1], cu_seqlens_q, lengths_k)
    ctx.set_materialize_grads(False)


def backward_torch(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    q, k, v, saved, cu_seqlens_q, lengths_k = ctx.saved_tensors
    gradients = attention_torch_backward(grad, q, k, v, saved, cu_seqlens_q, lengths_k, ctx.dropout_p, ctx.scale)
    return *gradients, None, None, None, None, None, None, None


attention_torch_forward.register_autograd(backward_torch, setup_context=save_for_torch_backward)
