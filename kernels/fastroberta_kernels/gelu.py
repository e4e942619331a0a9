"""Bias and GELU in one pass, exact (erf) or with the tanh approximation.

With s = x + bias, Phi the cumulative distribution function of the standard normal and phi its density:

    none:  y  = s * Phi(s) = s * (1 + erf(s / sqrt(2))) / 2
           dx = dy * (Phi(s) + s * phi(s))
    tanh:  y  = s * q,  q = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)),  u = sqrt(2/pi) * (s + 0.044715 * s^3)
           dx = dy * (q + 2 * s * q * (1 - q) * du/ds),  du/ds = sqrt(2/pi) * (1 + 3 * 0.044715 * s^2)
    dbias = sum over rows of dx

Shapes: x, y (..., N), of which the leading dimensions are flattened into rows; bias (N,) or None.
Dtypes: x and bias fp32, bf16 or fp16. y has the dtype of x, each gradient that of its tensor. All arithmetic is fp32,
including the sum s.

Saved for the backward: x and bias. Bytes moved per element, for tensors of b bytes: forward 2b (x, y), backward 3b (dy,
x, dx).

Determinism: no atomics; dbias is summed as described in `_rows`, in an order that depends on the GPU model. No random
numbers.

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ._dispatch import align, jit, launch, operator, tl, use_triton
from ._rows import KERNEL_DTYPES, REGISTER_LIMIT, count_programs, sum_partials, unify_dtypes

TILE = {"ROWS": 8, "BLOCK": 256}  # for eight warps; 256 columns are 512 bytes of a bf16 row


def bias_gelu_torch(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "none") -> torch.Tensor:
    """`bias_gelu` in PyTorch operations."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


@jit(do_not_specialize=["num_rows"])
def _bias_gelu_forward_kernel(
    x_ptr, bias_ptr, y_ptr,  # (rows, N), (N,) or None, (rows, N)
    num_rows, num_columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_columns, BLOCK)
    rows = ((tl.program_id(0) // num_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    mask = (rows < num_rows)[:, None] & column_mask[None, :]
    offsets = rows[:, None] * num_columns + columns[None, :]
    s = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if TANH:
        # For negative s, 1 + tanh(u) cancels; the logistic function of 2u does not.
        q = 1.0 / (1.0 + tl.exp(-2.0 * 0.7978845608028654 * (s + 0.044715 * s * s * s)))
    else:
        q = 0.5 + 0.5 * tl.erf(s * 0.7071067811865476)
    tl.store(y_ptr + offsets, (s * q).to(y_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["num_rows"])
def _bias_gelu_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr,  # (rows, N), (rows, N), (N,) or None, (rows, N)
    partials_ptr,  # fp32 (1, programs, N), or None as bias
    num_rows, num_columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=3):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & column_mask[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            s += bias[None, :]
        if TANH:
            # q * (1 - q) is computed from exp(-|2u|), since 1 - q cancels where q is close to 1.
            two_u = 2.0 * 0.7978845608028654 * (s + 0.044715 * s * s * s)
            e = tl.exp(-tl.abs(two_u))
            q = tl.where(two_u < 0.0, e, 1.0) / (1.0 + e)
            du = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * s * s)
            slope = q + 2.0 * s * du * (e / ((1.0 + e) * (1.0 + e)))
        else:
            q = 0.5 + 0.5 * tl.erf(s * 0.7071067811865476)
            slope = q + s * 0.3989422804014327 * tl.exp(-0.5 * s * s)
        dx = dy * slope
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx  # zero outside the mask, where dy is zero
    if partials_ptr is not None:
        partials_ptr += tl.program_id(0).to(tl.int64) * num_columns
        tl.store(partials_ptr + columns, tl.sum(dbias, axis=0), mask=column_mask)


@operator("bias_gelu_forward")
def _bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    y = _allocate_forward(x, bias, tanh)
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    num_tiles = -(-num_rows // TILE["ROWS"]) * -(-num_columns // TILE["BLOCK"])
    launch(
        _bias_gelu_forward_kernel, (num_tiles,),
        align(x), align(bias), y, num_rows, num_columns,
        TANH=tanh, **TILE, num_warps=8,
    )  # fmt: skip
    return y


@_bias_gelu_forward.register_fake
def _allocate_forward(x, bias, tanh):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator("bias_gelu_backward")
def _bias_gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dbias. Without a bias dbias is empty."""
    dx, dbias = _allocate_backward(dy, x, bias, tanh)
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    num_blocks = -(-num_columns // TILE["BLOCK"])
    # At 64 registers per thread, twice as many programs fit as `count_programs` assumes.
    num_programs = min(-(-2 * count_programs(x.device) // max(num_blocks, 1)), -(-num_rows // TILE["ROWS"]))
    partials = None
    if bias is not None:
        partials = torch.empty((1, num_programs, num_columns), dtype=torch.float32, device=x.device)
    launch(
        _bias_gelu_backward_kernel, (num_programs, num_blocks),
        align(dy), align(x), align(bias), dx, partials, num_rows, num_columns,
        TANH=tanh, **TILE, num_warps=8, maxnreg=REGISTER_LIMIT if x.dtype == torch.float32 else None,
    )  # fmt: skip
    if partials is not None:
        sum_partials(partials, (dbias,))
    return dx, dbias


@_bias_gelu_backward.register_fake
def _allocate_backward(dy, x, bias, tanh):
    dbias = x.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dbias


def _save_for_backward(ctx, inputs, output):
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = _bias_gelu_backward(dy, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias, None


_bias_gelu_forward.register_autograd(_backward, setup_context=_save_for_backward)


def bias_gelu(
    x: torch.Tensor, bias: torch.Tensor | None, *, approximate: str = "none", impl: str | None = None
) -> torch.Tensor:
    """gelu(x + bias).

    Args:
        x: (..., N), fp32, bf16 or fp16. bias: (N,) or None.
        approximate: "none" for the exact function, "tanh" for the approximation.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        (..., N) in the dtype of x.
    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an unknown `approximate`.
    """
    triton = use_triton("bias_gelu", impl, x, bias)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"bias_gelu: approximate={approximate!r} is unknown; use 'none' or 'tanh'")
    if bias is not None and (x.dim() == 0 or bias.shape != x.shape[-1:]):
        raise ValueError(
            f"bias_gelu: bias is {tuple(bias.shape)}, x is {tuple(x.shape)}; bias must be as long as the last dimension "
            "of x"
        )
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and (
            not tensor.dtype.is_floating_point or (triton and tensor.dtype not in KERNEL_DTYPES)
        ):
            raise ValueError(f"bias_gelu: {name} is {tensor.dtype}; use float32, bfloat16 or float16")
    if triton:
        (bias,) = unify_dtypes(x, bias)
        return _bias_gelu_forward(x, bias, approximate == "tanh")
    return bias_gelu_torch(x, bias, approximate)


class BiasGELU(torch.nn.Module):
    """gelu(x + bias), with a learned bias initialised to zero."""

    def __init__(
        self,
        features: int,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.approximate = approximate
        self.bias = torch.nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, approximate={self.approximate!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bias_gelu(x, self.bias, approximate=self.approximate)
