"""Rotary positions: queries and keys are rotated by angles that grow with their position, both in one pass.

The first half of a head's dimensions is paired with the second. With x = (x1, x2), and cos and sin of position m times the
frequency of each pair:

    y1 = x1 * cos - x2 * sin        y2 = x2 * cos + x1 * sin

The backward rotates the other way:

    dx1 = dy1 * cos + dy2 * sin     dx2 = dy2 * cos - dy1 * sin

A score then depends on the distance of query and key alone. The frequency of pair i of D / 2 is theta ** (-2i / D). Models
differ in theta, ModernBERT even between its local layers (10,000) and its global ones (160,000); hence cosines and sines
are arguments, which `make_tables` computes.

Shapes: queries and keys (..., heads, D), any strides but that of the last dimension; cos and sin (..., D / 2), without the
heads, for all leading dimensions or the last of them only (one table for all sequences of a batch). Outputs are contiguous.
Dtypes: q and k fp32, bf16 or fp16; cos and sin in any of these, best in fp32. The arithmetic is fp32.

Saved for the backward: cos and sin. Bytes moved per element of q and k, for tensors of b bytes: 2b in each direction, and
the tables, from L2 for all heads but one. Transformers' own composition moves about 10b. No random numbers, no sums.

Why not inside attention: its kernels load keys once for every block of queries, and would rotate them as often, from two
more tables whose addresses and values need registers that the backward does not have. A pass of its own costs 4 * D * b
bytes per token and head, about 5% of the time of a ModernBERT layer's linear maps on a GPU (counted, not measured), and
leaves attention as it is.

Source: Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864,
section 3.2.2; the pairing of halves is that of GPT-NeoX, which transformers and flash-attention (interleaved=False) share.
"""

from __future__ import annotations

import torch

from ._dispatch import jit, launch, operator, tl, use_triton
from ._rows import KERNEL_DTYPES

ELEMENTS = 1024  # of half a tile, for four warps; twice as many spill on sm_120


def make_tables(
    length: int, head_dim: int, theta: float = 10_000.0, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0 to length - 1, fp32 (length, head_dim / 2).

    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"make_tables: head_dim is {head_dim}; it must be even, as dimensions are rotated in pairs")
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)


class _Rotate(torch.autograd.Function):
    """The rotation in four passes over half the dimensions; its backward is the rotation by the opposite angle."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, cos, sin):
        dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
        cos, sin = cos.to(dtype), sin.to(dtype)
        first, second = x.to(dtype).chunk(2, -1)
        rotated = torch.cat(
            (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), -1
        )
        return rotated.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dy, cos, -sin), None, None


def apply_rotary_torch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary` in PyTorch operations."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


@jit
def _rotate_tile(x_ptr, y_ptr, offsets, offsets_y, half, mask, cos, sin):
    """Read both halves of some heads, rotate, write."""
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + half + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets_y, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + half + offsets_y, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["num_tokens", "num_positions"])
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr,  # (tokens, heads, 2 * half), twice; (positions, half), twice
    q_out_ptr, k_out_ptr,  # (tokens, heads, 2 * half), contiguous
    num_tokens, num_positions, half,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, position_stride,
    INVERSE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one head. Grid (tiles of tokens, heads)."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    mask = (tokens < num_tokens)[:, None] & (dims < half)[None, :]
    offsets = (tokens % num_positions)[:, None] * position_stride + dims[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    offsets_out = (tokens * tl.num_programs(1) + head)[:, None] * (2 * half) + dims[None, :]
    offsets_q = tokens[:, None] * q_token_stride + head * q_head_stride + dims[None, :]
    _rotate_tile(q_ptr, q_out_ptr, offsets_q, offsets_out, half, mask, cos, sin)
    offsets_k = tokens[:, None] * k_token_stride + head * k_head_stride + dims[None, :]
    _rotate_tile(k_ptr, k_out_ptr, offsets_k, offsets_out, half, mask, cos, sin)


def flatten_rows(tensor: torch.Tensor, num_inner: int) -> torch.Tensor:
    """The tensor with all but the last `num_inner` dimensions flattened: a view if rows are evenly spaced and aligned, as
    those of a fused projection are, else a copy."""
    flat = tensor.flatten(0, -1 - num_inner)
    is_aligned = flat.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in flat.stride()[:-1])
    return flat if is_aligned and flat.stride(-1) == 1 else flat.clone(memory_format=torch.contiguous_format)


@operator("rotary")
def _rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation of queries and keys (..., heads, head_dim), or the inverse rotation."""
    q_out, k_out = _allocate_rotary(q, k, cos, sin, inverse)
    q, k = flatten_rows(q, 2), flatten_rows(k, 2)
    cos, sin = flatten_rows(cos, 1), flatten_rows(sin, 1)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    num_tokens, num_heads, head_dim = q.shape
    half = head_dim // 2
    block = max(16, 1 << (half - 1).bit_length())
    tokens = max(1, ELEMENTS // block)
    launch(
        _rotary_kernel, (-(-num_tokens // tokens), num_heads),
        q, k, cos, sin, q_out, k_out,
        num_tokens, max(1, cos.shape[0]), half, *q.stride()[:2], *k.stride()[:2], cos.stride(0),
        INVERSE=inverse, TOKENS=tokens, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return q_out, k_out


@_rotary.register_fake
def _allocate_rotary(q, k, cos, sin, inverse):
    return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k))


def _save_for_backward(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    return *_rotary(dq, dk, cos, sin, not ctx.inverse), None, None, None


_rotary.register_autograd(_backward, setup_context=_save_for_backward)


def apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q, k: (..., heads, head_dim) of one shape and dtype, fp32, bf16 or fp16: (batch, length, heads, head_dim), or
            (tokens, heads, head_dim) for packed documents. Views of one fused projection are read in place.
        cos, sin: (length, head_dim / 2) for all sequences, as `make_tables` returns them, or one row for each token, in the
            leading shape of q. Packed documents need the latter: `cos[position_ids]`. They get no gradient.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        Rotated queries and keys in the shape and dtype of q.
    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an odd head_dim.
    """
    triton = use_triton("apply_rotary", impl, q, k, cos, sin)
    if q.dim() < 3 or q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError(
            f"apply_rotary: q is {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}; expected two tensors (..., "
            "heads, head_dim) of one shape and dtype"
        )
    if not q.dtype.is_floating_point or (triton and not {q.dtype, cos.dtype} <= set(KERNEL_DTYPES)):
        raise ValueError(f"apply_rotary: q is {q.dtype}, cos {cos.dtype}; use float32, bfloat16 or float16")
    leading, half = q.shape[:-2], q.shape[-1] // 2
    is_table = tuple(cos.shape) in ((*leading, half), (*leading[-1:], half))
    if q.shape[-1] % 2 or not is_table or cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"apply_rotary: cos is {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}, q {tuple(q.shape)}; "
            f"cos and sin must be {(*leading[-1:], half)} or {(*leading, half)}, in one dtype, and head_dim even"
        )
    if triton:
        return _rotary(q, k, cos.detach(), sin.detach(), False)
    return apply_rotary_torch(q, k, cos, sin)
