"""Linear layers whose matrix products multiply 8-bit numbers, and the casts to 8 bits that other kernels share.

For input x (n, k), weight W (m, k), bias b and upstream gradient dy, where Q4 and Q5 round to e4m3 and e5m2:

    y  = Q4(x) Q4(W)^T + b
    dx = Q5(dy) Q4(W),   dW = dy^T x,   db = sum over rows of dy

The derivatives are those of the product without rounding: a rounding has none, and counts as the identity.

A tensor x is kept as data = round(x * scale) in float8_e4m3fn (4 bits of exponent, 3 of mantissa) or float8_e5m2, with
inverse = 1 / scale in fp32, so that x is about data * inverse. There is one scale for the whole tensor. It is a power of
two, made of a bound on |x|:

    scale = 2^(TOP - floor(log2(bound))),  TOP = 7 for e4m3 (largest value 448), 14 for e5m2 (57,344)

so that the bound lands in [2^TOP, 2^(TOP + 1)), which leaves a factor of 1.75 for what is rounded up on the way. Scaling
by a power of two is exact: within the range of normal numbers a value is rounded to the same 8-bit number under every
scale. A bound that is too large by 2^k therefore costs k of the binades at the lower end and no precision: e4m3 has 14
binades of normal numbers below the bound and 3 of subnormal ones, e5m2 28 and 2. So no history of maxima is needed, a
resumed run has the same bits, and how a batch is divided changes next to nothing.

The bound is the largest |x|, found on the device, or follows from what produced x (`bound_layer_norm`, `bound_linear`):
then the kernel that produces x can write it in 8 bits in the same pass. Where a bound is not finite the inverse is NaN,
and with it every product: an overflow is never hidden.

Weight gradients multiply in 16 bits. In 8 bits they would need the transposes of x and dy, since sm_89 and sm_90 want the
summed dimension last. At a width of 768 writing those takes more than half of what the faster product saves, and the
rounding would go straight into the weights.

Shapes: x (..., k), of which the leading dimensions are flattened into rows; k and m multiples of 16.
Dtypes: products of 8-bit factors add in fp32 and give bf16; x of another dtype is rounded to bf16 first, y has its dtype.
Saved for the backward: as for bf16, x in 16 bits, and the weight in 8 bits.
Bytes moved besides the products, per element: 5 for a tensor whose largest value has to be found (2 + 2 + 1), 3 where a
bound is given, 1 where the kernel before writes it (`x_8`).

Needs a GPU of sm_89 or later. On a CPU the same rounding is emulated, which is slow and serves to check losses.
Determinism: as that of the products; no atomics here. No random numbers, no state from earlier steps.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._dispatch import align, get_capability, jit, launch, operator, tl, use_triton, without_autocast
from ._rows import count_programs

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOPS = {E4M3: 7, E5M2: 14}
MAXIMA = 512  # partial maxima at most
TILE = {"ROWS": 8, "BLOCK": 256}  # for eight warps
SQUARE_TILE = {"ROWS": 64, "BLOCK": 64}  # where columns are written too: 64 bytes of each


class Scaled(NamedTuple):
    """A tensor in 8 bits: it is about data * inverse.

    Attributes:
        data: float8_e4m3fn or float8_e5m2. inverse: fp32 scalar on its device, a power of two.
    """

    data: torch.Tensor
    inverse: torch.Tensor


class ScaledWeight(NamedTuple):
    """The weight of a linear layer in e4m3, in both layouts: products on sm_89 and sm_90 need the summed dimension last.

    Attributes:
        rows: (out, in), for the forward. columns: (in, out), for the gradient of the input. inverse: fp32 scalar.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    inverse: torch.Tensor

    def split(self, *sizes: int) -> list[ScaledWeight]:
        """The weights of several layers that share this one's input and scale, as views."""
        parts = zip(self.rows.split(sizes), self.columns.split(sizes, dim=1))
        return [ScaledWeight(rows, columns, self.inverse) for rows, columns in parts]


def allocate(x: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """Room for x in 8 bits."""
    data = torch.empty(x.shape, dtype=dtype, device=x.device)
    return Scaled(data, torch.empty((), dtype=torch.float32, device=x.device))


def bound_layer_norm(weight: torch.Tensor, bias: torch.Tensor, order: float = math.inf) -> torch.Tensor:
    """A bound on the elements of LayerNorm's output, or with `order` = 2 on the norm of its rows. fp32 scalar.

    Before weight and bias a row has norm sqrt(N) at most, and so has each of its elements.
    """
    largest, shift = (torch.linalg.vector_norm(v.detach(), ord) for v, ord in ((weight, math.inf), (bias, order)))
    return torch.add(shift.float(), largest.float(), alpha=math.sqrt(weight.shape[0]))


def bound_linear(row_norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A bound on the elements of a linear layer's output, given one on the norm of its input's rows (Cauchy-Schwarz)."""
    largest = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32).amax()
    return torch.addcmul(torch.linalg.vector_norm(bias.detach(), math.inf).float(), row_norm, largest)


def scale_torch(bound: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and inverse scale of a bound, an fp32 scalar."""
    top = TOPS[dtype]
    exponent = (bound.view(torch.int32) >> 23).clamp(top + 1, 254)  # of a finite number, and of a finite scale
    scale, inverse = (254 + top - exponent) << 23, (exponent - top) << 23
    return scale.view(torch.float32), inverse.view(torch.float32) + (bound - bound)


def cast_torch(x: torch.Tensor, bound: torch.Tensor | None, dtype: torch.dtype = E4M3) -> Scaled:
    """`cast` in PyTorch operations."""
    if bound is None:
        bound = torch.linalg.vector_norm(x, math.inf) if x.numel() else x.new_zeros(())
    scale, inverse = scale_torch(bound.float(), dtype)
    return Scaled((x * scale).to(dtype), inverse)


@jit
def make_scale(bound, TOP: tl.constexpr):
    """Scale and inverse scale of a bound."""
    exponent = tl.minimum(tl.maximum(bound.to(tl.int32, bitcast=True) >> 23, TOP + 1), 254)
    scale = ((254 + TOP - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - TOP) << 23).to(tl.float32, bitcast=True)
    return scale, inverse + (bound - bound)


@jit
def _locate(tile, num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of a tile."""
    num_blocks = tl.cdiv(num_columns, BLOCK)
    rows = ((tile // num_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tile % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    return rows, columns, (rows < num_rows)[:, None] & (columns < num_columns)[None, :]


@jit(do_not_specialize=["num_rows", "num_tiles"])
def _maxima_kernel(
    x_ptr, maxima_ptr,  # (rows, N), fp32 (programs,)
    num_rows, num_columns, num_tiles,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """max |x| of the tiles that each program takes."""
    largest = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows, columns, mask = _locate(tile, num_rows, num_columns, ROWS, BLOCK)
        x = tl.load(x_ptr + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    tl.store(maxima_ptr + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))


@jit(do_not_specialize=["num_rows", "num_tiles", "num_maxima"])
def _cast_kernel(
    x_ptr, maxima_ptr,  # (rows, N), fp32 (maxima,)
    y_ptr, transposed_ptr, inverse_ptr,  # (rows, N), (N, rows) or None, fp32 scalar
    num_rows, num_columns, num_tiles, num_maxima,
    TOP: tl.constexpr, MAXIMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, MAXIMA)
    bound = tl.max(tl.load(maxima_ptr + index, mask=index < num_maxima, other=0.0), axis=0)
    scale, inverse = make_scale(bound, TOP)
    tl.store(inverse_ptr, inverse, mask=tl.program_id(0) == 0)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows, columns, mask = _locate(tile, num_rows, num_columns, ROWS, BLOCK)
        offsets = rows[:, None] * num_columns + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = (x * scale).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=mask)
        if transposed_ptr is not None:
            turned = columns.to(tl.int64)[:, None] * num_rows + rows[None, :]
            tl.store(transposed_ptr + turned, tl.trans(y), mask=tl.trans(mask))


@operator("fp8_cast")
def _cast(
    x: torch.Tensor, bound: torch.Tensor | None, is_gradient: bool, transposes: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x in 8 bits, its transposed (empty if not asked for), and the inverse scale."""
    y, transposed, inverse = _allocate(x, bound, is_gradient, transposes)
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    x = align(x)
    if bound is None:
        num_tiles = -(-num_rows // TILE["ROWS"]) * -(-num_columns // TILE["BLOCK"])
        num_maxima = min(num_tiles, MAXIMA, 2 * count_programs(x.device))
        bound = torch.empty(max(num_maxima, 1), dtype=torch.float32, device=x.device)
        if num_tiles == 0:
            bound.zero_()
        launch(_maxima_kernel, (num_maxima,), x, bound, num_rows, num_columns, num_tiles, **TILE, num_warps=8)
    tile = SQUARE_TILE if transposes else TILE
    num_tiles = -(-num_rows // tile["ROWS"]) * -(-num_columns // tile["BLOCK"])
    launch(
        _cast_kernel, (max(1, min(num_tiles, 2 * count_programs(x.device))),),
        x, bound, y, transposed if transposes else None, inverse, num_rows, num_columns, num_tiles, bound.numel(),
        TOP=TOPS[y.dtype], MAXIMA=MAXIMA, **tile, num_warps=8,
    )  # fmt: skip
    return y, transposed, inverse


@_cast.register_fake
def _allocate(x, bound, is_gradient, transposes):
    y, inverse = allocate(x, E5M2 if is_gradient else E4M3)
    return y, torch.empty(x.shape[::-1] if transposes else (0,), dtype=y.dtype, device=x.device), inverse


def cast(x: torch.Tensor, triton: bool, bound: torch.Tensor | None = None, dtype: torch.dtype = E4M3) -> Scaled:
    """x in 8 bits.

    Args:
        x: (..., N), of any floating dtype. triton: whether to use the kernel.
        bound: fp32 scalar, on |x|; None for the largest |x|, which takes one more pass over x.
        dtype: E4M3, or E5M2 for gradients.
    """
    if triton:
        y, _, inverse = _cast(x, bound, dtype == E5M2, False)
        return Scaled(y, inverse)
    return cast_torch(x, bound, dtype)


def cast_weight(weight: torch.Tensor, impl: str | None = None) -> ScaledWeight:
    """The weight (out, in) of a linear layer in e4m3, in both layouts.

    Args:
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    """
    weight = weight.detach()
    if use_triton("cast_weight", impl, weight):
        return ScaledWeight(*_cast(weight, None, False, True))
    rows, inverse = cast_torch(weight, None)
    return ScaledWeight(rows, rows.t().contiguous(), inverse)


def multiply(a: Scaled, b: torch.Tensor, b_inverse: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a b^T + bias in bf16: a (rows, k), b (columns, k), both with the summed dimension last; bias bf16 (columns,).

    On a GPU a product of 8-bit matrices that adds in fp32. Elsewhere the rounded factors are multiplied in bf16, which
    holds each of them exactly, and powers of two come out of the sum unrounded.
    """
    if a.data.device.type != "cpu":
        # The fast mode adds in fewer bits: enough for activations, too coarse for gradients (as in Transformer Engine).
        return torch._scaled_mm(
            a.data, b.t(), a.inverse, b_inverse, bias, out_dtype=torch.bfloat16, use_fast_accum=a.data.dtype == E4M3
        )
    inverse = a.inverse * b_inverse
    left, right = a.data.to(torch.bfloat16), b.to(torch.bfloat16).t()
    product = torch.mm(left, right) if bias is None else torch.addmm((bias / inverse).to(torch.bfloat16), left, right)
    return product.mul_(inverse)


def as_scaled(x: torch.Tensor, x_8: torch.Tensor | None, inverse: torch.Tensor | None, triton: bool) -> Scaled:
    return cast(x, triton) if x_8 is None else Scaled(x_8, inverse)


@operator("fp8_linear_forward")
@without_autocast
def _linear_forward(
    x: torch.Tensor,
    x_8: torch.Tensor | None,
    x_inverse: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    inverse: torch.Tensor,
    triton: bool,
) -> torch.Tensor:
    return multiply(
        as_scaled(x, x_8, x_inverse, triton), rows, inverse, None if bias is None else bias.to(torch.bfloat16)
    )


@_linear_forward.register_fake
def _allocate_linear(x, x_8, x_inverse, weight, bias, rows, columns, inverse, triton):
    return x.new_empty(x.shape[0], rows.shape[0])


@operator("fp8_linear_backward")
@without_autocast
def _linear_backward(
    dy: torch.Tensor, x: torch.Tensor, columns: torch.Tensor, inverse: torch.Tensor, has_bias: bool, triton: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight and dbias, which is empty without a bias."""
    dx = multiply(cast(dy, triton, dtype=E5M2), columns, inverse)
    return dx, torch.mm(dy.t(), x), dy.sum(0) if has_bias else dy.new_empty(0)


@_linear_backward.register_fake
def _allocate_linear_backward(dy, x, columns, inverse, has_bias, triton):
    dbias = dy.new_empty(dy.shape[1] if has_bias else 0)
    return torch.empty_like(x), x.new_empty(dy.shape[1], x.shape[1]), dbias


def _save_linear(ctx, inputs, output):
    x, _, _, weight, bias, _, columns, inverse, ctx.triton = inputs
    ctx.save_for_backward(x, columns, inverse)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _differentiate_linear(ctx, dy):
    weight_dtype, bias_dtype = ctx.dtypes
    dx, dweight, dbias = _linear_backward(dy.contiguous(), *ctx.saved_tensors, bias_dtype is not None, ctx.triton)
    return dx, None, None, dweight.to(weight_dtype), dbias.to(bias_dtype) if bias_dtype else None, *(None,) * 4


_linear_forward.register_autograd(_differentiate_linear, setup_context=_save_linear)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_8: Scaled | None = None,
    weight_8: ScaledWeight | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """x weight^T + bias, as torch.nn.functional.linear, with 8-bit factors forward and in the gradient of x.

    Args:
        x: (..., k). weight: (m, k), bias: (m,), of any floating dtype; k and m are multiples of 16.
        x_8: x in e4m3 where it exists already. weight_8: of `cast_weight`, to be shared by calls until the weight changes.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        (..., m) in the dtype of x.
    Raises:
        ValueError: sizes that do not fit, a GPU older than sm_89, or different devices.
    """
    triton = use_triton("fp8_linear", impl, x, weight, bias)
    check("fp8_linear", x, weight)
    if weight_8 is None:
        weight_8 = cast_weight(weight, impl)
    matrix = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y = _linear_forward(matrix, *flatten(x_8), weight, bias, *weight_8, triton)
    return y.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


def flatten(x_8: Scaled | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if x_8 is None else (x_8.data.reshape(-1, x_8.data.shape[-1]), x_8.inverse)


def check(operation: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{operation}: x is {tuple(x.shape)}, the weight {tuple(weight.shape)}; the last dimensions must be equal"
        )
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(
            f"{operation}: the weight is {tuple(weight.shape)}; 8-bit products need multiples of 16 in both dimensions"
        )
    if weight.is_cuda and get_capability(weight.device) < 89:
        raise ValueError(f"{operation}: 8-bit products need a GPU of sm_89 or later; use a linear layer in bf16")


class FP8Linear(torch.nn.Linear):
    """`torch.nn.Linear` through `fp8_linear`, with its arguments, parameters and state_dict."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, self.weight, self.bias)
