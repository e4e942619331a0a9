"""Attention in a sliding window, in PyTorch operations: what `impl="torch"` runs, on any device.

Queries are taken a block at a time, with the keys that any of them sees. A block's scores are computed and masked by their
distance, and the softmax follows its definition. Work and memory grow with length times window.

Saved: Q, K, V, and the probabilities of all blocks in the dtype of Q. Dropout is drawn again in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import philox
from ._attention_cpu import SCORES_AT_ONCE, read_bounds
from ._dispatch import operator, without_autocast

QUERIES = 64  # of a block at least; half a window if that is more


class Block(NamedTuple):
    """Some queries of some sequences, and the keys that any of them sees.

    Attributes:
        queries, keys: the indices of both in tensors (batch, length, heads, head_dim).
        num_scores: of all its sequences and heads.
        hidden: bool (queries, keys): scores outside the window.
        first_row, first_key: the dropout row of its first query, the column of its first key.
    """

    queries: tuple[slice, slice]
    keys: tuple[slice, slice]
    num_scores: int
    hidden: torch.Tensor
    first_row: int
    first_key: int


def choose_queries(left: int, right: int) -> int:
    return max(QUERIES, (left + right) // 2)


def bound_window(left: int, right: int, max_seqlen_q: int, max_seqlen_k: int) -> tuple[int, int]:
    """The window with -1 replaced by a length that no distance exceeds, and other values bounded by it."""
    longest = max(max_seqlen_q, max_seqlen_k)
    return (longest if left < 0 else min(left, longest)), (longest if right < 0 else min(right, longest))


def count_saved(q: torch.Tensor, max_seqlen_k: int, left: int, right: int) -> int:
    """An upper bound of the number of scores in all blocks."""
    num_rows_and_heads = q.numel() // q.shape[-1]
    return num_rows_and_heads * min(max_seqlen_k, choose_queries(left, right) + left + right)


def list_blocks(
    q: torch.Tensor, k: torch.Tensor, bounds: tuple[list[int], list[int]] | None, lengths: list[int] | None,
    left: int, right: int,
) -> Iterator[Block]:  # fmt: skip
    """The blocks of q and k (batch, length, heads, head_dim); packed documents are one batch.

    Queries without a key in their window are left out.
    """
    batch, length_q, num_heads, _ = q.shape
    step = choose_queries(left, right)
    if bounds is not None:
        starts_q, starts_k = bounds
        sequences = [(0, 1, *limits) for limits in zip(starts_q, starts_q[1:], starts_k, starts_k[1:])]
    elif lengths is not None:
        sequences = [(b, b + 1, 0, length_q, 0, length) for b, length in enumerate(lengths)]
    else:
        scores = num_heads * min(step, length_q) * min(step + left + right, k.shape[1])
        at_once = max(1, SCORES_AT_ONCE * torch.get_num_threads() // max(1, scores))
        sequences = [(b, min(b + at_once, batch), 0, length_q, 0, k.shape[1]) for b in range(0, batch, at_once)]
    for b0, b1, q0, q1, k0, k1 in sequences:
        num_seeing = min(q1 - q0, k1 - k0 + left) if k1 > k0 else 0
        for m0 in range(0, num_seeing, step):
            m1 = min(m0 + step, num_seeing)
            n0, n1 = max(m0 - left, 0), min(m1 + right, k1 - k0)
            distance = torch.arange(n0, n1, device=q.device) - torch.arange(m0, m1, device=q.device)[:, None]
            yield Block(
                (slice(b0, b1), slice(q0 + m0, q0 + m1)),
                (slice(b0, b1), slice(k0 + n0, k0 + n1)),
                (b1 - b0) * num_heads * (m1 - m0) * (n1 - n0),
                (distance < -left) | (distance > right),
                b0 * length_q + q0 + m0,
                n0,
            )


def read_sequences(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, lengths_k: torch.Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[tuple[list[int], list[int]] | None, list[int] | None]:  # fmt: skip
    """Bounds of packed documents, or numbers of keys, on the host and checked."""
    if lengths_k is None:
        return None, None
    if cu_seqlens_q is None:
        return None, lengths_k.clamp(0, k.shape[1]).tolist()
    longest = max_seqlen_q, max_seqlen_k
    return read_bounds(cu_seqlens_q, lengths_k, (q.shape[1], k.shape[1]), longest), None


def draw_scale(seed: torch.Tensor, dropout_p: float, block: Block, sizes: torch.Size, length_q: int) -> torch.Tensor:
    """What dropout multiplies the probabilities (sequences, heads, queries, keys) of a block by."""
    count, num_heads, num_q, num_k = sizes
    keeps = []
    for index in range(count):
        rows_seed = torch.stack((seed[0], seed[1] + block.first_row + index * length_q))
        keep = philox.dropout_keep_torch(rows_seed, dropout_p, num_q, block.first_key + num_k, num_heads)
        keeps.append(keep[..., block.first_key :].transpose(0, 1))
    return torch.stack(keeps) * philox.dropout_scale(dropout_p)


def as_batch(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Packed documents (tokens, heads, head_dim) as one batch."""
    return [tensor if tensor.dim() == 4 else tensor[None] for tensor in tensors]


@operator("window_attention_torch")
@without_autocast
def window_attention_torch(
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
    left: int,
    right: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the probabilities before dropout, saved for the backward."""
    left, right = bound_window(left, right, max_seqlen_q, max_seqlen_k)
    saved = q.new_empty(count_saved(q, max_seqlen_k, left, right))
    out = q.new_zeros(q.shape)
    out_blhd, q, k, v = as_batch(out, q, k, v)
    statistics_dtype = torch.promote_types(q.dtype, torch.float32)
    used = 0
    sequences = read_sequences(q, k, cu_seqlens_q, lengths_k, max_seqlen_q, max_seqlen_k)
    for block in list_blocks(q, k, *sequences, left, right):
        q_bhqd, k_bhkd, v_bhkd = (
            tensor[index].transpose(1, 2) for tensor, index in ((q, block.queries), (k, block.keys), (v, block.keys))
        )
        scores = torch.matmul(q_bhqd.to(statistics_dtype), k_bhkd.to(statistics_dtype).transpose(2, 3)).mul_(scale)
        probabilities = torch.softmax(scores.masked_fill_(block.hidden, -math.inf), -1)
        kept = saved[used : used + block.num_scores].view(scores.shape).copy_(probabilities)
        used += block.num_scores
        if seed is not None:
            kept = kept * draw_scale(seed, dropout_p, block, kept.shape, q.shape[1]).to(kept.dtype)
        out_blhd[block.queries] = torch.matmul(kept, v_bhkd).transpose(1, 2)
    saved[used:] = 0  # repeated runs give the same bits, in what nobody reads too
    return out, saved


@window_attention_torch.register_fake
def _(q, k, v, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale, left, right):
    left, right = bound_window(left, right, max_seqlen_q, max_seqlen_k)
    return q.new_empty(q.shape), q.new_empty(count_saved(q, max_seqlen_k, left, right))


@operator("window_attention_torch_backward")
@without_autocast
def window_attention_torch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float,
    left: int,
    right: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the queries, keys and values."""
    left, right = bound_window(left, right, max_seqlen_q, max_seqlen_k)
    # Keys belong to several blocks: their gradients are summed in fp32 at least.
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    dq_blhd, dk_blhd, dv_blhd, grad, q, k, v = as_batch(dq, dk, dv, grad, q, k, v)
    used = 0
    sequences = read_sequences(q, k, cu_seqlens_q, lengths_k, max_seqlen_q, max_seqlen_k)
    for block in list_blocks(q, k, *sequences, left, right):
        grad_bhqd, q_bhqd = (tensor[block.queries].transpose(1, 2) for tensor in (grad, q))
        k_bhkd, v_bhkd = (tensor[block.keys].transpose(1, 2) for tensor in (k, v))
        sizes = (*q_bhqd.shape[:3], k_bhkd.shape[2])
        probabilities = kept = saved[used : used + block.num_scores].view(sizes)
        used += block.num_scores
        dprobabilities = torch.matmul(grad_bhqd, v_bhkd.transpose(2, 3))
        if seed is not None:
            factor = draw_scale(seed, dropout_p, block, kept.shape, q.shape[1]).to(kept.dtype)
            kept, dprobabilities = kept * factor, dprobabilities.mul_(factor)
        dv_blhd[block.keys] += torch.matmul(kept.transpose(2, 3), grad_bhqd).transpose(1, 2)
        dscores = torch._softmax_backward_data(dprobabilities, probabilities, -1, q.dtype).mul_(scale)
        dq_blhd[block.queries] = torch.matmul(dscores, k_bhkd).transpose(1, 2)
        dk_blhd[block.keys] += torch.matmul(dscores.transpose(2, 3), q_bhqd).transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@window_attention_torch_backward.register_fake
def _(grad, q, k, v, saved, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens_q, lengths_k, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, output[1], cu_seqlens_q, lengths_k, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    return *window_attention_torch_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 9


window_attention_torch.register_autograd(_backward, setup_context=_save_for_backward)
