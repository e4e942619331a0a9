"""Bias and GELU in one pass, exact (erf) or with the tanh approximation, and its gated form, GeGLU.

With s = x + bias, Phi the cumulative distribution function of the standard normal and phi its density:

    none:  y  = s * Phi(s) = s * (1 + erf(s / sqrt(2))) / 2
           dx = dy * (Phi(s) + s * phi(s))
    tanh:  y  = s * q,  q = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)),  u = sqrt(2/pi) * (s + 0.044715 * s^3)
           dx = dy * (q + 2 * s * q * (1 - q) * du/ds),  du/ds = sqrt(2/pi) * (1 + 3 * 0.044715 * s^2)
    dbias = sum over rows of dx

GeGLU splits the last dimension of x + bias into halves a and b, of which b gates:

    y = gelu(a) * b,   da = dy * b * gelu'(a),   db = dy * gelu(a),   dx = (da, db),   dbias = sum over rows of dx

Shapes: x, y (..., N), of which the leading dimensions are flattened into rows; bias (N,) or None. For GeGLU, x is
(..., 2N) and bias (2N,).
Dtypes: x and bias fp32, bf16 or fp16. y has the dtype of x, each gradient that of its tensor. All arithmetic is fp32,
including the sum s.

Saved for the backward: x and bias. Bytes moved per element of y, for tensors of b bytes: forward 2b (x, y), backward 3b
(dy, x, dx); GeGLU 3b and 5b. PyTorch's own operations move 5b and 13b for a GeGLU, and save gelu(a) besides x.

Determinism: no atomics; dbias is summed as described in `_rows`, in an order that depends on the GPU model. No random
numbers.

Sources: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2; Shazeer, "GLU Variants Improve
Transformer", arXiv 2002.05202, section 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ._dispatch import align, jit, launch, operator, tl, use_triton
from ._rows import KERNEL_DTYPES, REGISTER_LIMIT, count_programs, sum_partials, unify_dtypes
from .fp8 import E4M3, E5M2, TOPS, Scaled, allocate, cast, make_scale

# For eight warps; 256 columns are 512 bytes of a bf16 row.
TILE = {"ROWS": 8, "BLOCK": 256}
FORWARD_TILE = {"ROWS": 16, "BLOCK": 256}  # 7% fewer instructions an element than with 8 rows


def bias_gelu_torch(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "none") -> torch.Tensor:
    """`bias_gelu` in PyTorch operations."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


@jit
def _distribute(s):
    """Phi(s) and exp(-s^2 / 2).

    1 - Phi(|s|) is exp(-s^2 / 2) times a smooth ratio (Mills'), here a polynomial of degree 12. Fitted with the weights
    max(1, |s|) exp(-s^2 / 2), it is off by 9e-9 at most, less than fp32 rounds. CUDA's erf evaluates two polynomials and
    takes one of them. With it the forward needs 1.4 times as many instructions, whose issue takes longer on a H100 than
    the memory traffic.
    """
    size = tl.minimum(tl.abs(s), 16.0)  # the tail is zero there, and a polynomial of infinity is not
    e = tl.exp2(size * size * -0.7213475204444817)
    ratio = 4.61809719e-08 * size - 1.3252594e-06
    ratio = ratio * size + 1.71984211e-05
    ratio = ratio * size - 0.000135102353
    ratio = ratio * size + 0.000729966036
    ratio = ratio * size - 0.00294681708
    ratio = ratio * size + 0.00950587634
    ratio = ratio * size - 0.0259299949
    ratio = ratio * size + 0.0621858723
    ratio = ratio * size - 0.132893607
    ratio = ratio * size + 0.249987885
    ratio = ratio * size - 0.398941696
    ratio = ratio * size + 0.5
    tail = ratio * e
    return tl.where(s < 0.0, tail, 1.0 - tail), e


@jit
def _evaluate(s, TANH: tl.constexpr):
    """q, of which gelu(s) = s * q."""
    if TANH:
        # For negative s, 1 + tanh(u) cancels; the logistic function of 2u does not.
        q = 1.0 / (1.0 + tl.exp(-2.0 * 0.7978845608028654 * (s + 0.044715 * s * s * s)))
    else:
        q, _ = _distribute(s)
    return q


@jit
def _differentiate(s, TANH: tl.constexpr):
    """q, of which gelu(s) = s * q, and the derivative of gelu at s."""
    if TANH:
        # q * (1 - q) is computed from exp(-|2u|), since 1 - q cancels where q is close to 1.
        two_u = 2.0 * 0.7978845608028654 * (s + 0.044715 * s * s * s)
        e = tl.exp(-tl.abs(two_u))
        q = tl.where(two_u < 0.0, e, 1.0) / (1.0 + e)
        du = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * s * s)
        slope = q + 2.0 * s * du * (e / ((1.0 + e) * (1.0 + e)))
    else:
        q, e = _distribute(s)
        slope = q + s * 0.3989422804014327 * e
    return q, slope


@jit(do_not_specialize=["num_rows"])
def _bias_gelu_forward_kernel(
    x_ptr, bias_ptr, y_ptr,  # (rows, N), (N,) or None, (rows, N)
    bound_ptr, y_8_ptr, inverse_ptr,  # of y in 8 bits: fp32 scalar, (rows, N), fp32 scalar; or None
    num_rows, num_columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr,
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
    y = s * _evaluate(s, TANH)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if y_8_ptr is not None:
        scale, inverse = make_scale(tl.load(bound_ptr), TOP)
        tl.store(inverse_ptr, inverse, mask=tl.program_id(0) == 0)
        tl.store(y_8_ptr + offsets, (y * scale).to(y_8_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["num_rows"])
def _bias_gelu_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr,  # (rows, N), (rows, N), (N,) or None, (rows, N)
    bound_ptr, dx_8_ptr, inverse_ptr,  # of dx in 8 bits: fp32 scalar, (rows, N), fp32 scalar; or None
    partials_ptr,  # fp32 (1, programs, N), or None as bias
    num_rows, num_columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if dx_8_ptr is not None:
        scale, inverse = make_scale(tl.load(bound_ptr), TOP)
        tl.store(inverse_ptr, inverse, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=3):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & column_mask[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            s += bias[None, :]
        _, slope = _differentiate(s, TANH)
        dx = dy * slope
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dx_8_ptr is not None:
            tl.store(dx_8_ptr + offsets, (dx * scale).to(dx_8_ptr.dtype.element_ty), mask=mask)
        dbias += dx  # zero outside the mask, where dy is zero
    if partials_ptr is not None:
        partials_ptr += tl.program_id(0).to(tl.int64) * num_columns
        tl.store(partials_ptr + columns, tl.sum(dbias, axis=0), mask=column_mask)


@operator("bias_gelu_forward")
def _bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    y = _allocate_forward(x, bias, tanh)
    _launch_forward(x, bias, tanh, y)
    return y


def _launch_forward(x, bias, tanh, y, *in_8_bits):
    """`in_8_bits`: the bound on y; y in 8 bits and its inverse scale, to be written."""
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    num_tiles = -(-num_rows // FORWARD_TILE["ROWS"]) * -(-num_columns // FORWARD_TILE["BLOCK"])
    launch(
        _bias_gelu_forward_kernel, (num_tiles,),
        align(x), align(bias), y, *(in_8_bits or (None,) * 3), num_rows, num_columns,
        TANH=tanh, **FORWARD_TILE, TOP=TOPS[E4M3], num_warps=8,
    )  # fmt: skip


@_bias_gelu_forward.register_fake
def _allocate_forward(x, bias, tanh):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator("bias_gelu_backward")
def _bias_gelu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dbias. Without a bias dbias is empty."""
    dx, dbias = _allocate_backward(dy, x, bias, tanh)
    _launch_backward(dy, x, bias, tanh, dx, dbias)
    return dx, dbias


def _launch_backward(dy, x, bias, tanh, dx, dbias, *in_8_bits):
    """`in_8_bits`: the bound on dx; dx in 8 bits and its inverse scale, to be written."""
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    num_blocks = -(-num_columns // TILE["BLOCK"])
    # At 64 registers per thread, twice as many programs fit as `count_programs` assumes.
    num_programs = min(-(-2 * count_programs(x.device) // max(num_blocks, 1)), -(-num_rows // TILE["ROWS"]))
    partials = None
    if bias is not None:
        partials = torch.empty((1, num_programs, num_columns), dtype=torch.float32, device=x.device)
    launch(
        _bias_gelu_backward_kernel, (num_programs, num_blocks),
        align(dy), align(x), align(bias), dx, *(in_8_bits or (None,) * 3), partials, num_rows, num_columns,
        TANH=tanh, **TILE, TOP=TOPS[E5M2], num_warps=8, maxnreg=REGISTER_LIMIT if x.dtype == torch.float32 else None,
    )  # fmt: skip
    if partials is not None:
        sum_partials(partials, (dbias,))


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


def forward_in_8_bits(
    x: torch.Tensor, bias: torch.Tensor, tanh: bool, bound: torch.Tensor | None, triton: bool
) -> tuple[torch.Tensor, Scaled]:
    """gelu(x + bias), and the same in e4m3: written in one pass where a bound on it is given. For the forward of `fp8`."""
    if not triton:
        y = bias_gelu_torch(x, bias, "tanh" if tanh else "none")
        return y, cast(y, False, bound)
    (bias,) = unify_dtypes(x, bias)
    y = _allocate_forward(x, bias, tanh)
    if bound is None:
        _launch_forward(x, bias, tanh, y)
        return y, cast(y, True)
    y_8 = allocate(x, E4M3)
    _launch_forward(x, bias, tanh, y, bound, *y_8)
    return y, y_8


def backward_in_8_bits(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, tanh: bool, bound: torch.Tensor, triton: bool
) -> tuple[torch.Tensor, torch.Tensor, Scaled]:
    """dx, dbias, and dx in e5m2, written in the same pass with a scale from a bound on it. For the backward of `fp8`.

    Args:
        x, dy: (rows, N).
    """
    if not triton:
        s = x + bias.to(x.dtype)
        dx = torch.ops.aten.gelu_backward(dy, s, approximate="tanh" if tanh else "none")
        return dx, dx.sum(0).to(bias.dtype), cast(dx, False, bound, E5M2)
    (same,) = unify_dtypes(x, bias)
    dx, dbias = _allocate_backward(dy, x, same, tanh)
    dx_8 = allocate(x, E5M2)
    _launch_backward(dy, x, same, tanh, dx, dbias, bound, *dx_8)
    return dx, dbias.to(bias.dtype), dx_8


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
    _check("bias_gelu", triton, x, bias, approximate)
    if triton:
        (bias,) = unify_dtypes(x, bias)
        return _bias_gelu_forward(x, bias, approximate == "tanh")
    return bias_gelu_torch(x, bias, approximate)


def _check(operation: str, triton: bool, x: torch.Tensor, bias: torch.Tensor | None, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{operation}: approximate={approximate!r} is unknown; use 'none' or 'tanh'")
    if bias is not None and (x.dim() == 0 or bias.shape != x.shape[-1:]):
        raise ValueError(
            f"{operation}: bias is {tuple(bias.shape)}, x is {tuple(x.shape)}; bias must be as long as the last dimension "
            "of x"
        )
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and (
            not tensor.dtype.is_floating_point or (triton and tensor.dtype not in KERNEL_DTYPES)
        ):
            raise ValueError(f"{operation}: {name} is {tensor.dtype}; use float32, bfloat16 or float16")


class BiasGELU(torch.nn.Module):
    """gelu(x + bias), with a learned bias initialised to zero, or without one if `bias` is False."""

    def __init__(
        self,
        features: int,
        approximate: str = "none",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.features, self.approximate = features, approximate
        self.bias = torch.nn.Parameter(torch.zeros(features, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.features}, approximate={self.approximate!r}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bias_gelu(x, self.bias, approximate=self.approximate)


# ---- GeGLU -----------------------------------------------------------------------------------------------------------


def geglu_torch(x: torch.Tensor, bias: torch.Tensor | None, approximate: str = "none") -> torch.Tensor:
    """`geglu` in PyTorch operations."""
    s = x if bias is None else x + bias.to(x.dtype)
    half = s.shape[-1] // 2
    # The backward of chunk concatenates, which autocast on a CPU refuses for fp16.
    a, b = (s[..., :half], s[..., half:]) if s.dtype == torch.float16 else s.chunk(2, -1)
    return F.gelu(a, approximate=approximate) * b


@jit(do_not_specialize=["num_rows"])
def _geglu_forward_kernel(
    x_ptr, bias_ptr, y_ptr,  # (rows, 2N), (2N,) or None, (rows, N)
    num_rows, num_columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_columns, BLOCK)
    rows = ((tl.program_id(0) // num_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    mask = (rows < num_rows)[:, None] & column_mask[None, :]
    offsets = rows[:, None] * num_columns + columns[None, :]
    x_ptrs = x_ptr + (offsets + rows[:, None] * num_columns)
    a = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptrs + num_columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        a += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias_ptr + num_columns + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, (a * _evaluate(a, TANH) * b).to(y_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["num_rows"])
def _geglu_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr,  # (rows, N), (rows, 2N), (2N,) or None, (rows, 2N)
    partials_ptr,  # fp32 (1, programs, 2N), or None as bias
    num_rows, num_columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < num_columns
    if bias_ptr is not None:
        bias_a = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        bias_b = tl.load(bias_ptr + num_columns + columns, mask=column_mask, other=0.0).to(tl.float32)
    sum_a = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    sum_b = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=2):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < num_rows)[:, None] & column_mask[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        offsets_x = offsets + rows[:, None] * num_columns
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x_ptr + offsets_x, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + num_columns + offsets_x, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            a += bias_a[None, :]
            b += bias_b[None, :]
        q, slope = _differentiate(a, TANH)
        da = dy * b * slope
        db = dy * a * q
        tl.store(dx_ptr + offsets_x, da.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + num_columns + offsets_x, db.to(dx_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            sum_a += da  # zero outside the mask, where dy is zero
            sum_b += db
    if partials_ptr is not None:
        partials_ptr += tl.program_id(0).to(tl.int64) * (2 * num_columns)
        tl.store(partials_ptr + columns, tl.sum(sum_a, axis=0), mask=column_mask)
        tl.store(partials_ptr + num_columns + columns, tl.sum(sum_b, axis=0), mask=column_mask)


@operator("geglu_forward")
def _geglu_forward(x: torch.Tensor, bias: torch.Tensor | None, tanh: bool) -> torch.Tensor:
    y = _allocate_geglu_forward(x, bias, tanh)
    num_rows, num_columns = math.prod(x.shape[:-1]), y.shape[-1]
    num_tiles = -(-num_rows // TILE["ROWS"]) * -(-num_columns // TILE["BLOCK"])
    launch(
        _geglu_forward_kernel, (num_tiles,),
        align(x), align(bias), y, num_rows, num_columns,
        TANH=tanh, **TILE, num_warps=8,
    )  # fmt: skip
    return y


@_geglu_forward.register_fake
def _allocate_geglu_forward(x, bias, tanh):
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


@operator("geglu_backward")
def _geglu_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dbias. Without a bias dbias is empty."""
    dx, dbias = _allocate_backward(dy, x, bias, tanh)
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1] // 2
    num_blocks = -(-num_columns // TILE["BLOCK"])
    num_programs = min(-(-count_programs(x.device) // max(num_blocks, 1)), -(-num_rows // TILE["ROWS"]))
    partials = None
    if bias is not None:
        partials = torch.empty((1, num_programs, x.shape[-1]), dtype=torch.float32, device=x.device)
    launch(
        _geglu_backward_kernel, (num_programs, num_blocks),
        align(dy), align(x), align(bias), dx, partials, num_rows, num_columns,
        TANH=tanh, **TILE, num_warps=8, maxnreg=REGISTER_LIMIT,
    )  # fmt: skip
    if partials is not None:
        sum_partials(partials, (dbias,))
    return dx, dbias


_geglu_backward.register_fake(_allocate_backward)


def _backward_geglu(ctx, dy):
    x, bias = ctx.saved_tensors
    dx, dbias = _geglu_backward(dy, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias, None


_geglu_forward.register_autograd(_backward_geglu, setup_context=_save_for_backward)


def geglu(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, approximate: str = "none", impl: str | None = None
) -> torch.Tensor:
    """gelu(a) * b, where a and b are the halves of x + bias along the last dimension.

    Args:
        x: (..., 2N), fp32, bf16 or fp16. bias: (2N,) or None.
        approximate, impl: as in `bias_gelu`.
    Returns:
        (..., N) in the dtype of x.
    Raises:
        ValueError: mismatched shapes, dtypes or devices, an odd last dimension, or an unknown `approximate`.
    """
    triton = use_triton("geglu", impl, x, bias)
    _check("geglu", triton, x, bias, approximate)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"geglu: x is {tuple(x.shape)}; its last dimension must be even, to be split in halves")
    if triton:
        (bias,) = unify_dtypes(x, bias)
        return _geglu_forward(x, bias, approximate == "tanh")
    return geglu_torch(x, bias, approximate)


class GeGLU(torch.nn.Module):
    """`geglu` as a module without parameters, as `torch.nn.GLU`."""

    def __init__(self, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return geglu(x, approximate=self.approximate)
