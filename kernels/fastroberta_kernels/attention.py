"""Bidirectional softmax attention with dropout, for dense batches and for packed documents, whole or in a sliding window.

Forward, for each sequence and head, with s = scale and Z = 256 / (256 - threshold) for kept elements, 0 for others:

    P = softmax(s * Q K^T)        O = (P * Z) V

Backward, given dO:

    delta = rowsum(dO * O)        dP = Z * (dO V^T)        dS = P * (dP - delta)
    dV = (P * Z)^T dO             dK = s * dS^T Q          dQ = s * dS K

`delta` equals rowsum(P * dP), since O already includes the dropout. The full score matrix never exists: the forward walks
over blocks of keys and rescales its sums whenever a row's maximum grows (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; Dao, "FlashAttention-2", 2023, sections 3.1 and 3.2). Exponentials are base 2, with
log2(e) folded into the scale. Statistics and accumulators are fp32.

Saved: Q, K, V, O and, for each head and query, log2 of the softmax's denominator (fp32, (heads, query rows)). P and Z are
recomputed. Random numbers: element (query, key) of a head is decided by (row, head, column) of `philox`, where row is
batch * length + query, or the packed index of the query, and column is the index of the key in its own sequence.

One backward kernel, five matrix products
    The usual pair of kernels, one for dK and dV and one for dQ, needs seven matrix products and computes every
    exponential and random number twice. Here one program owns a head. Its outer loop runs over blocks of keys, with dK
    and dV in registers, and its inner loop over all queries; dQ accumulates in fp32 scratch memory, once per block of
    keys. No other program touches that scratch, so there are no atomics and repeated runs give the same bits. At 512
    queries of 64 dimensions it takes 128 KiB per head: 17 MB for one head on each of 132 multiprocessors, which stays in
    the L2 cache. All tiles are (keys, queries), so that no product takes a transposed product as its operand; dQ is
    computed transposed. If there are few heads, the keys of each are divided among programs, and their parts of dQ are
    summed afterwards.

    Counted for 768 heads of 512 x 512 x 64: 129 instead of 180 GFLOP, 201M instead of 403M exponentials, 0.5 GB of device
    memory traffic (Q, K, V, O, dO, dQ, dK, dV, scratch) and, with blocks of 128 keys, 0.8 GB of scratch traffic in L2.
    Predicted, not measured: 1.2 times the speed of the pair without dropout, 1.3 times with it, less for few heads.

Bytes moved by the forward: Q and O once; K and V once per block of queries, from L2 after the first; 4 bytes per row.

Full blocks
    In 16 bits, where all sequences have the same lengths, these are multiples of a block, and there is no window, the
    kernels have no masks (`EVEN`). Every floating-point operation stays, and so does every bit of the results.

Sliding window
    With `window_size` (left, right), query i sees keys i - left to i + right of its sequence. P is zero elsewhere, and pairs
    of blocks without a visible score are skipped in both directions. The forward starts at the first visible block of
    keys; the backward takes, for each block of keys, the queries that see it. Its scratch for dQ starts from zero then,
    since the first visit of a query is no longer that of the first block. With windows of 64 on both sides (ModernBERT)
    the forward visits 4 blocks of 64 keys for each 128 queries, and the backward 256 queries for each 128 keys, however
    long the sequence. Without a window the machine code is the same as if windows did not exist.

On CPUs, and with impl="torch", `_attention_cpu` does the work, and `_attention_window_cpu` that with a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from . import philox
from ._attention_cpu import NO_TRANSFORM, attention_torch, attention_torch_forward
from ._attention_window_cpu import window_attention_torch
from ._dispatch import align, cast_for_autocast, get_capability, is_transforming, jit, launch, operator, tl, use_triton
from .philox import dropout_keep, load_seed

LOG2_E = 1.4426950408889634
HEAD_DIMS = (32, 64, 128)
UNLIMITED = 1 << 30  # the side of a window that has no bound; a sum with an index stays in 32 bits


@jit
def clamp_document(bounds_ptr, total):
    """First row and number of rows of a document, kept inside the tensor: wrong bounds give wrong rows, no stray write.

    With TRITON_DEBUG=1 in the environment wrong bounds stop the program instead.
    """
    start, end = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    tl.device_assert(
        (start >= 0) & (start <= end) & (end <= total), "cu_seqlens must ascend from 0 to the number of rows"
    )
    first = tl.minimum(tl.maximum(start, 0), total).to(tl.int64)
    return first, tl.maximum(tl.minimum(end, total) - first, 0).to(tl.int32)


@jit
def locate_sequence(
    batch, cu_seqlens_q_ptr, lengths_k_ptr, length_q, length_k, total_q, total_k,
    VARLEN: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """First query row in the flattened batch, number of queries, first key row and number of keys of a sequence."""
    if VARLEN:
        first_q, num_q = clamp_document(cu_seqlens_q_ptr + batch, total_q)
        first_k, num_k = clamp_document(lengths_k_ptr + batch, total_k)
    else:
        first_q = batch * length_q
        first_k = batch * length_k
        num_q = tl.full((), 0, tl.int32) + length_q
        num_k = tl.full((), 0, tl.int32) + length_k
        if HAS_LENGTHS:
            num_k = tl.minimum(tl.maximum(tl.load(lengths_k_ptr + batch).to(tl.int32), 0), num_k)
    return first_q, num_q, first_k, num_k


@jit
def is_below(indices, end, EVEN: tl.constexpr):
    """Which indices are below `end`. With EVEN all are, which the compiler then knows: it drops the masks made of this."""
    return tl.full(indices.shape, True, tl.int1) if EVEN else indices < end


# Specialised are only the sizes that save registers: strides, which `align_heads` makes multiples of 16, and the number
# of keys, if it is the same for all sequences.
@jit(do_not_specialize=["length_q", "total_q", "total_k", "threshold", "window_left", "window_right"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, lengths_k_ptr, seed_ptr,
    q_batch_stride, q_row_stride, q_head_stride,
    k_batch_stride, k_row_stride, k_head_stride,
    v_batch_stride, v_row_stride, v_head_stride,
    length_q, length_k, total_q, total_k, qk_scale, keep_scale, threshold,
    window_left, window_right,  # None without a window
    VARLEN: tl.constexpr, HAS_LENGTHS: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head and sequence against all its keys. Grid (blocks, heads, batch)."""
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_q, num_q, first_k, num_k = locate_sequence(
        batch, cu_seqlens_q_ptr, lengths_k_ptr, length_q, length_k, total_q, total_k, VARLEN, HAS_LENGTHS
    )
    if start_m >= num_q:
        return
    row_stride = tl.num_programs(1) * HEAD_DIM
    first_q += start_m
    if VARLEN:
        q_ptr += first_q * q_row_stride + head * q_head_stride
        k_ptr += first_k * k_row_stride + head * k_head_stride
        v_ptr += first_k * v_row_stride + head * v_head_stride
    else:
        q_ptr += batch * q_batch_stride + start_m.to(tl.int64) * q_row_stride + head * q_head_stride
        k_ptr += batch * k_batch_stride + head * k_head_stride
        v_ptr += batch * v_batch_stride + head * v_head_stride
    out_ptr += first_q * row_stride + head * HEAD_DIM
    lse_ptr += head * total_q + first_q

    # Offsets inside a tile fit in 32 bits, which takes half the registers; the pointers advance in 64 bits.
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    k_offsets = columns[:, None] * k_row_stride + dims[None, :]
    v_offsets = columns[:, None] * v_row_stride + dims[None, :]
    is_row = is_below(rows, num_q - start_m, EVEN)
    q = tl.load(q_ptr + rows[:, None] * q_row_stride + dims[None, :], mask=is_row[:, None], other=0.0)
    if DROPOUT:
        key_low, key_high, first_row = load_seed(seed_ptr)
        random_rows = first_row + first_q + rows
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    first_n, end_n = 0, num_k
    if window_left is not None:
        first_n = tl.maximum(start_m - window_left, 0) // BLOCK_N * BLOCK_N
        end_n = tl.minimum(num_k, start_m + BLOCK_M + window_right)
        k_ptr += first_n.to(tl.int64) * k_row_stride
        v_ptr += first_n.to(tl.int64) * v_row_stride
        # The lowest finite number: a row may see no key of its first block, and -inf - -inf is NaN.
        largest = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
    for start_n in range(first_n, end_n, BLOCK_N):
        is_column = is_below(columns, num_k - start_n, EVEN)
        k = tl.load(k_ptr + k_offsets, mask=is_column[:, None], other=0.0)
        v = tl.load(v_ptr + v_offsets, mask=is_column[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if window_left is not None:
            distance = (start_n - start_m + columns)[None, :] - rows[:, None]
            is_seen = is_column[None, :] & (distance >= -window_left) & (distance <= window_right)
            scores = tl.where(is_seen, scores * qk_scale, float("-inf"))
        else:
            scores = scores * qk_scale + tl.where(is_column, 0.0, float("-inf"))[None, :]
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        probabilities = tl.exp2(scores - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        total = total * correction + tl.sum(probabilities, 1)
        if DROPOUT:
            keep = dropout_keep(key_low, key_high, random_rows, head, start_n, threshold, BLOCK_M, BLOCK_N)
            probabilities = tl.where(keep, probabilities, 0.0)
        out = tl.dot(probabilities.to(v.dtype), v, out * correction[:, None], input_precision="ieee")
        largest = new_largest
        k_ptr += BLOCK_N * k_row_stride
        v_ptr += BLOCK_N * v_row_stride
    # Without keys the total is zero. The output is then zero too, and a finite statistic keeps NaN out of the backward.
    has_keys = total > 0.0
    total = tl.where(has_keys, total, 1.0)
    lse = tl.where(has_keys, largest + tl.log2(total), 0.0)
    out = out * (keep_scale / total)[:, None]
    out_offsets = rows[:, None] * row_stride + dims[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(lse_ptr + rows, lse, mask=is_row)


@jit(do_not_specialize=["length_q", "total_q", "total_k", "threshold", "window_left", "window_right"])
def attention_backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, delta_ptr, partial_ptr,
    cu_seqlens_q_ptr, lengths_k_ptr, seed_ptr,
    q_batch_stride, q_row_stride, q_head_stride,
    k_batch_stride, k_row_stride, k_head_stride,
    v_batch_stride, v_row_stride, v_head_stride,
    dq_row_stride, dk_row_stride,
    length_q, length_k, total_q, total_k, chunk, qk_scale, scale, keep_scale, threshold,
    window_left, window_right,  # None without a window
    VARLEN: tl.constexpr, HAS_LENGTHS: tl.constexpr, EVEN: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: `chunk` keys of one head and sequence against all its queries. Grid (chunks, heads, batch)."""
    first_n = tl.program_id(0) * chunk
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1)
    first_q, num_q, first_k, num_k = locate_sequence(
        batch, cu_seqlens_q_ptr, lengths_k_ptr, length_q, length_k, total_q, total_k, VARLEN, HAS_LENGTHS
    )
    if VARLEN:
        q_ptr += first_q * q_row_stride + head * q_head_stride
        k_ptr += first_k * k_row_stride + head * k_head_stride
        v_ptr += first_k * v_row_stride + head * v_head_stride
        num_written_k = num_k
    else:
        q_ptr += batch * q_batch_stride + head * q_head_stride
        k_ptr += batch * k_batch_stride + head * k_head_stride
        v_ptr += batch * v_batch_stride + head * v_head_stride
        num_written_k = tl.full((), 0, tl.int32) + length_k
    # In the output, its gradient and the results, the heads of a row are contiguous.
    row_stride = num_heads * HEAD_DIM
    out_ptr += first_q * row_stride + head * HEAD_DIM
    grad_ptr += first_q * row_stride + head * HEAD_DIM
    lse_ptr += head * total_q + first_q
    private = (tl.program_id(0) * num_heads + head) * total_q + first_q
    delta_ptr += private
    partial_ptr += private * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)

    for start_m in range(0, num_q, BLOCK_M):
        rows = start_m + tl.arange(0, BLOCK_M)
        is_row = is_below(rows, num_q, EVEN)
        offsets = rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
        out = tl.load(out_ptr + offsets, mask=is_row[:, None], other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=is_row[:, None], other=0.0).to(tl.float32)
        tl.store(delta_ptr + rows, tl.sum(out * grad, 1), mask=is_row)
        if window_left is not None:
            zeros = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
            partial_ptrs = partial_ptr + rows.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(partial_ptrs, zeros, mask=is_row[:, None])
    tl.debug_barrier()

    if DROPOUT:
        key_low, key_high, first_row = load_seed(seed_ptr)
        first_row += first_q
    last_n = tl.minimum(first_n + chunk, num_written_k)
    last_active_n = tl.minimum(last_n, num_k)
    # Visit at least one block, so that queries without keys get a gradient of zero.
    for start_n in range(first_n, tl.maximum(last_n, first_n + 1), BLOCK_N):
        columns = start_n + tl.arange(0, BLOCK_N)
        is_column = is_below(columns, last_active_n, EVEN)
        offsets_n = columns.to(tl.int64)[:, None]
        k = tl.load(k_ptr + offsets_n * k_row_stride + dims[None, :], mask=is_column[:, None], other=0.0)
        v = tl.load(v_ptr + offsets_n * v_row_stride + dims[None, :], mask=is_column[:, None], other=0.0)
        dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        dv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        # Blocks of ignored keys only write zeros.
        first_m = 0
        end_m = tl.where((start_n == first_n) | (start_n < last_active_n), num_q, 0)
        if window_left is not None:
            end_n = tl.minimum(start_n + BLOCK_N, last_active_n)
            first_m = tl.maximum(start_n - window_right, 0) // BLOCK_M * BLOCK_M
            end_m = tl.where(start_n < end_n, tl.minimum(num_q, end_n + window_left), 0)
        for start_m in range(first_m, end_m, BLOCK_M):
            rows = start_m + tl.arange(0, BLOCK_M)
            is_row = is_below(rows, num_q, EVEN)
            if window_left is not None:
                is_row = rows < end_m  # queries that see no key at all may hold NaN
            offsets_m = rows.to(tl.int64)
            q = tl.load(q_ptr + offsets_m[:, None] * q_row_stride + dims[None, :], mask=is_row[:, None], other=0.0)
            grad = tl.load(grad_ptr + offsets_m[:, None] * row_stride + dims[None, :], mask=is_row[:, None], other=0.0)
            # exp2(s - inf) = 0, so rows past the end need no other mask.
            lse = tl.load(lse_ptr + rows, mask=is_row, other=float("inf"))
            delta = tl.load(delta_ptr + rows, mask=is_row, other=0.0)
            # With all tiles (keys, queries), every product takes its operands in their own layout.
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            probabilities = tl.exp2(scores * qk_scale - lse[None, :])
            is_seen = is_column[:, None]
            if window_left is not None:
                distance = columns[:, None] - rows[None, :]
                is_seen = is_seen & (distance >= -window_left) & (distance <= window_right)
            probabilities = tl.where(is_seen, probabilities, 0.0)
            dprobabilities = tl.dot(v, tl.trans(grad), input_precision="ieee")
            if DROPOUT:
                keep = tl.trans(
                    dropout_keep(key_low, key_high, first_row + rows, head, start_n, threshold, BLOCK_M, BLOCK_N)
                )
                dropped = tl.where(keep, probabilities, 0.0)
                dprobabilities = tl.where(keep, dprobabilities * keep_scale, 0.0)
            else:
                dropped = probabilities
            dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision="ieee")
            dscores = (probabilities * (dprobabilities - delta[None, :])).to(q.dtype)
            dk = tl.dot(dscores, q, dk, input_precision="ieee")
            dq = tl.dot(tl.trans(k), dscores, input_precision="ieee")
            partial_ptrs = partial_ptr + offsets_m[None, :] * HEAD_DIM + dims[:, None]
            if window_left is not None:
                dq += tl.load(partial_ptrs, mask=is_row[None, :], other=0.0)
            else:
                dq += tl.load(partial_ptrs, mask=is_row[None, :] & (start_n > first_n), other=0.0)
            tl.store(partial_ptrs, dq, mask=is_row[None, :])
        is_written = is_below(columns, last_n, EVEN)[:, None]
        offsets_dk = (first_k * dk_row_stride + head * HEAD_DIM) + offsets_n * dk_row_stride + dims[None, :]
        # The queries of a sequence without keys may hold NaN, which a product with zero does not remove.
        dk = tl.where(is_column[:, None], dk * scale, 0.0)
        dv = tl.where(is_column[:, None], dv * keep_scale, 0.0)
        tl.store(dk_ptr + offsets_dk, dk.to(dk_ptr.dtype.element_ty), mask=is_written)
        tl.store(dv_ptr + offsets_dk, dv.to(dv_ptr.dtype.element_ty), mask=is_written)
        # Later code reads what other threads of this program wrote.
        tl.debug_barrier()

    if tl.num_programs(0) == 1:
        dq_ptr += first_q * dq_row_stride + head * HEAD_DIM
        for start_m in range(0, num_q, BLOCK_M):
            rows = start_m + tl.arange(0, BLOCK_M)
            is_row = is_below(rows, num_q, EVEN)[:, None]
            offsets_m = rows.to(tl.int64)[:, None]
            dq = tl.load(partial_ptr + offsets_m * HEAD_DIM + dims[None, :], mask=is_row, other=0.0)
            dq = (dq * scale).to(dq_ptr.dtype.element_ty)
            tl.store(dq_ptr + offsets_m * dq_row_stride + dims[None, :], dq, mask=is_row)


# (bytes of the dtype, head_dim) -> BLOCK_M, BLOCK_N, num_warps, num_stages. These fit every chip, also those with 99 KB
# of shared memory (sm_86, sm_89, sm_120).
FORWARD_BLOCKS = {
    (2, 32): (128, 32, 4, 3),
    (2, 64): (128, 64, 8, 2),
    (2, 128): (128, 32, 8, 2),
    (4, 32): (64, 32, 4, 2),
    (4, 64): (32, 32, 8, 2),
    (4, 128): (32, 32, 8, 1),  # a second stage's addresses spill with Triton 3.9.0
}
BACKWARD_BLOCKS = {
    (2, 32): (16, 128, 8, 2),
    (2, 64): (16, 128, 8, 2),
    (2, 128): (16, 64, 8, 1),
    (4, 32): (16, 32, 8, 1),
    (4, 64): (16, 16, 8, 1),
    (4, 128): (16, 16, 8, 1),
}
# Exceptions by (compute capability times ten, bytes, head_dim). On sm_90 and sm_100 tensor cores run at half speed or less
# on tiles of 16 queries: on sm_90 a 64 x 128 backward needs 29% fewer issue slots with dropout, 43% fewer without. It
# spills on sm_80, as the 128 x 128 forward does on sm_100.
CHIP_FORWARD_BLOCKS = {(90, 2, 64): (128, 128, 8, 2)}
CHIP_BACKWARD_BLOCKS = {(90, 2, 64): (64, 128, 8, 1), (100, 2, 64): (64, 128, 8, 1)}
# Exceptions of the forward in a window. That of fp32 would spill on sm_90. Smaller tiles visit fewer keys outside the
# window: for 64 keys on either side they need 48% fewer issue slots on sm_90, 19% fewer on sm_100.
WINDOW_FORWARD_BLOCKS = {(4, 128): (32, 16, 8, 1)}
CHIP_WINDOW_FORWARD_BLOCKS = {(90, 2, 64): (64, 64, 4, 3), (100, 2, 64): (64, 64, 4, 3)}
# `maxnreg` where ptxas, given no limit, spills registers in order to fit one more block on a multiprocessor.
FORWARD_REGISTERS = {(2, 128): 255, (4, 32): 255, (4, 64): 128, (4, 128): 255}
BACKWARD_REGISTERS = {(2, 32): 255, (2, 128): 255, (4, 64): 255}
# With fewer programs than MIN_PROGRAMS, the keys of a head are divided among up to MAX_CHUNKS programs.
MIN_PROGRAMS, MAX_CHUNKS = 256, 8
# The third dimension of a grid is at most 65535. A multiple of four keeps slices of int32 tensors aligned.
MAX_SEQUENCES = 65_532


def choose_blocks(
    q: torch.Tensor,
    blocks: dict[tuple[int, int], tuple[int, int, int, int]],
    chip_blocks: dict[tuple[int, int, int], tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages for the dtype and head_dim of `q` on its chip."""
    key = q.element_size(), q.shape[-1]
    return chip_blocks.get((get_capability(q.device), *key), blocks[key])


def strides_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, row and head. Packed documents have no batch dimension."""
    batch, row, head, *_ = tensor.stride() if tensor.dim() == 4 else (0, *tensor.stride())
    return batch, row, head


def align_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if its heads are not aligned for vector loads. Loading single elements would take four times
    as many registers for addresses, which some kernels do not have."""
    if all(stride % 16 == 0 for stride in strides_of(tensor)) and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def split_documents(
    q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, lengths_k: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the number of sequences of each launch and its slices of the two length tensors.

    Where the kernel reads no lengths, `q` is passed as a placeholder. All other arguments refer to the whole batch.
    """
    lengths_k = align(lengths_k)
    if cu_seqlens_q is None:
        yield q.shape[0], q, q if lengths_k is None else lengths_k
        return
    cu_seqlens_q, count = align(cu_seqlens_q), cu_seqlens_q.numel() - 1
    for first in range(0, count, MAX_SEQUENCES):
        part = slice(first, min(first + MAX_SEQUENCES, count) + 1)
        yield part.stop - part.start - 1, cu_seqlens_q[part], lengths_k[part]


def window_arguments(left: int, right: int) -> tuple[int | None, int | None]:
    """The window as the kernels take it: None if neither side has a bound."""
    if left < 0 and right < 0:
        return None, None
    return min(left, UNLIMITED) if left >= 0 else UNLIMITED, min(right, UNLIMITED) if right >= 0 else UNLIMITED


def fills_blocks(
    q: torch.Tensor, block_m: int, block_n: int, max_seqlen_q: int, max_seqlen_k: int, is_dense: bool, window: tuple
) -> bool:
    """Whether each block is full and each of its scores counts, so that kernels can do without masks.

    No keys are no block, but the backward visits one in any case. Masks stay in fp32: without them the forward of 128
    dimensions spills on sm_100.
    """
    is_full = max_seqlen_k > 0 and max_seqlen_q % block_m == 0 and max_seqlen_k % block_n == 0
    return is_full and is_dense and window[0] is None and q.element_size() == 2


def random_arguments(q: torch.Tensor, seed: torch.Tensor | None, dropout_p: float) -> tuple[torch.Tensor, float, int]:
    """Seed, scale and threshold of dropout. Without dropout the seed is not read, and `q` is a placeholder."""
    return (q if seed is None else align(seed)), philox.dropout_scale(dropout_p), philox.dropout_threshold(dropout_p)


@operator("attention_forward")
def attention_forward(
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
    window_left: int = -1,
    window_right: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and log2 of the softmax denominators, fp32 (heads, query rows)."""
    is_varlen = cu_seqlens_q is not None
    q, k, v = align_heads(q), align_heads(k), align_heads(v)
    # Packed tensors may have rows outside all documents.
    new = torch.zeros if is_varlen else torch.empty
    out = new(q.shape, dtype=q.dtype, device=q.device)
    num_heads, head_dim = q.shape[-2:]
    total_q = q.shape[0] if is_varlen else q.shape[0] * q.shape[1]
    lse = new((num_heads, total_q), dtype=torch.float32, device=q.device)
    window = window_arguments(window_left, window_right)
    blocks, chip_blocks = FORWARD_BLOCKS, CHIP_FORWARD_BLOCKS
    if window[0] is not None:
        blocks, chip_blocks = blocks | WINDOW_FORWARD_BLOCKS, chip_blocks | CHIP_WINDOW_FORWARD_BLOCKS
    block_m, block_n, num_warps, num_stages = choose_blocks(q, blocks, chip_blocks)
    seed_or_q, keep_scale, threshold = random_arguments(q, seed, dropout_p)
    is_dense = not is_varlen and lengths_k is None
    is_even = fills_blocks(q, block_m, block_n, max_seqlen_q, max_seqlen_k, is_dense, window)
    for count, part_q, part_k in split_documents(q, cu_seqlens_q, lengths_k):
        launch(
            attention_forward_kernel,
            (-(-max_seqlen_q // block_m), num_heads, count),
            q, k, v, out, lse, part_q, part_k, seed_or_q,
            *strides_of(q), *strides_of(k), *strides_of(v),
            max_seqlen_q, 0 if is_varlen else max_seqlen_k, total_q, k.shape[0], scale * LOG2_E, keep_scale, threshold,
            *window,
            VARLEN=is_varlen, HAS_LENGTHS=lengths_k is not None, EVEN=is_even, DROPOUT=seed is not None,
            HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
            maxnreg=FORWARD_REGISTERS.get((q.element_size(), head_dim)),
        )  # fmt: skip
    return out, lse


@attention_forward.register_fake
def _(q, k, v, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale, *window):
    num_rows = math.prod(q.shape[:-2])
    return q.new_empty(q.shape), q.new_empty((q.shape[-2], num_rows), dtype=torch.float32)


@operator("attention_backward")
def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    lengths_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the queries, keys and values."""
    is_varlen = cu_seqlens_q is not None
    new = torch.zeros if is_varlen else torch.empty
    dq, dk, dv = (new(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    launch_backward(
        grad, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale,
        window_left, window_right,
    )  # fmt: skip
    return dq, dk, dv


def launch_backward(
    grad, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale,
    window_left=-1, window_right=-1,
):  # fmt: skip
    """Fill dq, dk and dv. Their heads are contiguous in a row; rows may have any stride, the same for dk and dv."""
    is_varlen = cu_seqlens_q is not None
    q, k, v = align_heads(q), align_heads(k), align_heads(v)
    num_heads, head_dim = q.shape[-2:]
    num_sequences = cu_seqlens_q.numel() - 1 if is_varlen else q.shape[0]
    total_q = q.shape[0] if is_varlen else q.shape[0] * q.shape[1]
    block_m, block_n, num_warps, num_stages = choose_blocks(q, BACKWARD_BLOCKS, CHIP_BACKWARD_BLOCKS)
    num_blocks = max(1, -(-max_seqlen_k // block_n))
    num_chunks = min(-(-MIN_PROGRAMS // max(1, num_sequences * num_heads)), MAX_CHUNKS, num_blocks)
    blocks_in_chunk = -(-num_blocks // num_chunks)
    num_chunks = -(-num_blocks // blocks_in_chunk)
    # Each program has a part of its own: one head, one chunk, all queries.
    delta = torch.empty((num_chunks, num_heads, total_q), dtype=torch.float32, device=q.device)
    partial = torch.empty((num_chunks, num_heads, total_q, head_dim), dtype=torch.float32, device=q.device)
    if is_varlen and num_chunks > 1:
        partial.zero_()
    seed_or_q, keep_scale, threshold = random_arguments(q, seed, dropout_p)
    grad = align(grad)
    window = window_arguments(window_left, window_right)
    is_dense = not is_varlen and lengths_k is None
    is_even = fills_blocks(q, block_m, block_n, max_seqlen_q, max_seqlen_k, is_dense, window)
    for count, part_q, part_k in split_documents(q, cu_seqlens_q, lengths_k):
        launch(
            attention_backward_kernel,
            (num_chunks, num_heads, count),
            grad, q, k, v, out, lse, dq, dk, dv, delta, partial, part_q, part_k, seed_or_q,
            *strides_of(q), *strides_of(k), *strides_of(v), dq.stride(-3), dk.stride(-3),
            max_seqlen_q, 0 if is_varlen else max_seqlen_k, total_q, k.shape[0], blocks_in_chunk * block_n,
            scale * LOG2_E, scale, keep_scale, threshold, *window,
            VARLEN=is_varlen, HAS_LENGTHS=lengths_k is not None, EVEN=is_even, DROPOUT=seed is not None,
            HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
            maxnreg=BACKWARD_REGISTERS.get((q.element_size(), head_dim)),
        )  # fmt: skip
    if num_chunks > 1:
        dq.copy_((partial.sum(0) * scale).transpose(0, 1).view(dq.shape))


@attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale, *window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens_q, lengths_k, seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, lengths_k, seed)
    ctx.set_materialize_grads(False)


def backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    return *attention_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 9


attention_forward.register_autograd(backward, setup_context=save_for_backward)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    impl: str | None = None,
) -> torch.Tensor:
    """Softmax attention of each query to the keys of its sequence, all or those in a window around it.

    There is no mask but `key_lengths` and `window_size`, since encoders of this family need no other. Causal attention is
    the window (-1, 0), for as many queries as keys. An additive bias or mask, as in ALiBi, T5 or DeBERTa, would be another
    input to read, and in the backward one more sum to write for each score, in kernels that have no registers to spare:
    use scaled_dot_product_attention(attn_mask=...) or torch.nn.attention.flex_attention.

    Args:
        q: (batch, length_q, heads, head_dim), fp32, bf16 or fp16. k, v: (batch, length_k, heads, head_dim), same dtype.
            Views of one fused projection (batch, length, 3, heads, head_dim) are read in place. Under autocast they are
            cast to its dtype, as for scaled_dot_product_attention. In PyTorch also fp64.
        dropout_p: dropout probability, rounded to a multiple of 1/256. Kept values are scaled so that the mean is exact.
        scale: factor of the scores; None means head_dim ** -0.5.
        seed: int, or int64 tensor (key,) or (key, first_row); required if dropout_p > 0.
        key_lengths: int32 (batch,): keys from this index on are ignored, whatever they hold, NaN included. A length is
            clamped to [0, length_k]. A sequence without keys yields zeros.
        window_size: (left, right): query i sees keys i - left to i + right, both counted from the start of the sequence.
            (flash-attention counts from the end, which differs where there are more keys than queries.) -1 stands for no
            bound. A query without a key in its window yields zeros.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        (batch, length_q, heads, head_dim) in the dtype of q, or of autocast.
    Raises:
        ValueError: mismatched shapes, dtypes or devices; dropout without a seed; a window of less than -1; with Triton also
            a head_dim above 128 (smaller ones are padded to 32, 64 or 128) or any other dtype.
    """
    q, k, v = cast_for_autocast(q, k, v)
    seed = check_arguments("attention", q, k, v, dropout_p, seed)
    if q.dim() != 4:
        raise ValueError(f"attention: q is {tuple(q.shape)}, expected (batch, length, heads, head_dim)")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: q has batch {q.shape[0]}, k and v have {k.shape[0]}; make them equal")
    if key_lengths is not None:
        check_lengths("attention", "key_lengths", key_lengths, q.shape[0])
    left, right = check_window("attention", window_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = (q.shape[1], k.shape[1])
    if use_triton("attention", impl, q, k, v, seed, key_lengths):
        return run_padded(q, k, v, None, key_lengths, seed, *lengths, dropout_p, scale, left, right)
    if left >= 0 or right >= 0:
        return window_attention_torch(q, k, v, None, key_lengths, seed, *lengths, dropout_p, scale, left, right)[0]
    return attention_torch(q, k, v, dropout_p=dropout_p, scale=scale, seed=seed, key_lengths=key_lengths)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    impl: str | None = None,
) -> torch.Tensor:
    """`attention` for packed documents: each query attends to the keys of its own document.

    Args:
        q: (tokens_q, heads, head_dim). k, v: (tokens_k, heads, head_dim).
        cu_seqlens_q, cu_seqlens_k: int32 (documents + 1,): the start of each document, and the end of the last. Empty
            documents are allowed; at the end they keep shapes static, for instance for a CUDA graph. Bounds outside the
            tensors or out of order raise in PyTorch. The kernel, which cannot raise without waiting for the device, clamps
            them to the tensors; with TRITON_DEBUG=1 in the environment it stops at them.
        max_seqlen_q, max_seqlen_k: upper bounds of document lengths, as ints so that nothing is read from the device. If
            they are too small, rows are left out on a GPU, and PyTorch raises.
        dropout_p, scale, seed, impl: as in `attention`. The dropout row of a query is its index in `q`.
        window_size: as in `attention`, inside each document.
    Returns:
        (tokens_q, heads, head_dim); zeros for documents without keys and for rows after the last document.
    Raises:
        ValueError: as in `attention`; also if the lengths are not int32 or differ in size.
    """
    q, k, v = cast_for_autocast(q, k, v)
    seed = check_arguments("varlen_attention", q, k, v, dropout_p, seed)
    if q.dim() != 3:
        raise ValueError(f"varlen_attention: q is {tuple(q.shape)}, expected (tokens, heads, head_dim)")
    check_lengths("varlen_attention", "cu_seqlens_q", cu_seqlens_q)
    check_lengths("varlen_attention", "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.numel())
    left, right = check_window("varlen_attention", window_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds, lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    if use_triton("varlen_attention", impl, q, k, v, seed, *bounds):
        return run_padded(q, k, v, *bounds, seed, *lengths, dropout_p, scale, left, right)
    if left >= 0 or right >= 0:
        return window_attention_torch(q, k, v, *bounds, seed, *lengths, dropout_p, scale, left, right)[0]
    if is_transforming():
        raise ValueError(NO_TRANSFORM.format("varlen_attention", "attention with key_lengths"))
    return attention_torch_forward(q, k, v, *bounds, seed, *lengths, dropout_p, scale)[0]


def check_arguments(
    operation: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    seed: int | torch.Tensor | None,
) -> torch.Tensor | None:
    """Check what all implementations require. Returns the seed as a tensor, or None without dropout."""
    if k.shape != v.shape or q.shape[-2:] != k.shape[-2:] or q.dim() != k.dim():
        raise ValueError(
            f"{operation}: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; k and v must have one shape, and "
            "q the same heads and head_dim"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{operation}: q is {q.dtype}, k {k.dtype}, v {v.dtype}; cast them to one dtype")
    philox.dropout_threshold(dropout_p)
    if dropout_p == 0:
        return None
    if seed is None:
        raise ValueError(f"{operation}: dropout_p={dropout_p} needs a seed; pass seed=, or dropout_p=0")
    return philox.as_seed(seed, q.device)


def check_window(operation: str, window_size: tuple[int, int]) -> tuple[int, int]:
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(
            f"{operation}: window_size is {tuple(window_size)}; give the number of keys to the left and to the right, or "
            "-1 for no bound"
        )
    return left, right


def check_lengths(operation: str, name: str, lengths: torch.Tensor, count: int | None = None) -> None:
    if lengths.dtype != torch.int32 or lengths.dim() != 1 or (count is None and lengths.numel() == 0):
        raise ValueError(f"{operation}: {name} is {tuple(lengths.shape)} {lengths.dtype}, expected 1-D int32")
    if count is not None and lengths.numel() != count:
        raise ValueError(f"{operation}: {name} has {lengths.numel()} elements, expected {count}")


def run_padded(q, k, v, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale, left, right):
    """Run the kernels, with heads padded by zeros to a supported dimension."""
    head_dim = q.shape[-1]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention: the kernel takes float32, bfloat16 and float16, got {q.dtype}; cast, or pass impl='torch'"
        )
    if cu_seqlens_q is None and q.shape[0] > MAX_SEQUENCES:
        raise ValueError(
            f"attention: the kernel takes {MAX_SEQUENCES} sequences at once, got {q.shape[0]}; split the batch"
        )
    if head_dim > HEAD_DIMS[-1]:
        raise ValueError(f"attention: the kernel takes head_dim <= {HEAD_DIMS[-1]}, got {head_dim}; pass impl='torch'")
    padding = min(size for size in HEAD_DIMS if size >= head_dim) - head_dim
    tensors = [F.pad(tensor, (0, padding)) if padding else tensor for tensor in (q, k, v)]
    tensors = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    lengths_k = lengths_k if lengths_k is None else lengths_k.contiguous()
    cu_seqlens_q = cu_seqlens_q if cu_seqlens_q is None else cu_seqlens_q.contiguous()
    out, _ = attention_forward(
        *tensors, cu_seqlens_q, lengths_k, seed, max_seqlen_q, max_seqlen_k, dropout_p, scale, left, right
    )
    return out[..., :head_dim]


class SelfAttention(nn.Module):
    """Self-attention with the parameters and state_dict of `torch.nn.MultiheadAttention(batch_first=True)`.

    Dropout acts on attention probabilities, in training mode only, where it needs `seed`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, device=None, dtype=None
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"SelfAttention: embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, device=device, dtype=dtype)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self._draw_projections()

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.MultiheadAttention does."""
        self.out_proj.reset_parameters()
        self._draw_projections()

    def _draw_projections(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, bias={self.in_proj_bias is not None}"

    def forward(
        self,
        x: torch.Tensor,
        *,
        key_lengths: torch.Tensor | None = None,
        seed: int | torch.Tensor | None = None,
        impl: str | None = None,
    ) -> torch.Tensor:
        """x (batch, length, embed_dim) -> the same shape. `seed` is required in training mode with dropout."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        out = attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, seed=seed, key_lengths=key_lengths, impl=impl
        )
        return self.out_proj(out.flatten(2))
