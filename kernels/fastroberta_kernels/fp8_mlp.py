"""The MLP of a transformer with 8-bit matrix products: gelu(x U^T + u) D^T.

One function, not two of `fp8` with a `gelu` between, because each part knows what the next one needs: the GELU kernels
write their result in 8 bits in the pass that makes it, with a scale from a bound known before (Cauchy-Schwarz). With Q4,
Q5 and scales as in `fp8`, and dy the upstream gradient:

    s  = Q4(x) Q4(U)^T,   a = gelu(s + u),   y = Q4(a) Q4(D)^T
    da = Q5(dy) Q4(D),    ds = da * gelu'(s + u),   dx = Q5(ds) Q4(U)
    dU = ds^T x,   dD = dy^T a,   du = sum over rows of ds
    |a|  <= (largest norm of a row of x) (largest norm of a row of U) + largest |u|
    |ds| <= 1.13 (largest norm of a row of dy) (largest norm of a column of D)

Shapes: x (..., k), U (f, k), u (f,), D (m, f); k, f and m multiples of 16. The leading dimensions are flattened into rows.
Dtypes, determinism and devices: as in `fp8`.
Saved for the backward: x, s, u and a in 16 bits, and the weights in 8 bits.
Bytes moved besides the products and GELU's own, per element: 1 each for a and ds, 5 for dy. For x see `fp8_linear`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import gelu
from ._dispatch import operator, use_triton, without_autocast
from .fp8 import (
    E5M2,
    TOPS,
    Scaled,
    ScaledWeight,
    as_scaled,
    bound_linear,
    cast,
    cast_weight,
    check,
    flatten,
    multiply,
)

STEEPEST = 1.13  # the largest derivative of either GELU


class ScaledMLP(NamedTuple):
    """Both weights of an MLP in 8 bits, and what bounds its inner tensors.

    Attributes:
        bound: fp32 scalar, at least the largest |gelu|; None to find the largest in a pass of its own.
        column_norm: fp32 scalar, the largest norm of a column of the second weight.
    """

    up: ScaledWeight
    down: ScaledWeight
    bound: torch.Tensor | None
    column_norm: torch.Tensor


def cast_mlp(
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    row_norm: torch.Tensor | None = None,
    impl: str | None = None,
) -> ScaledMLP:
    """The weights for `fp8_mlp`, to be shared by its calls until they change.

    Args:
        row_norm: fp32 scalar, a bound on the norm of the input's rows: `bound_layer_norm(weight, bias, order=2)` of the
            LayerNorm before.
    """
    bound = None if row_norm is None else bound_linear(row_norm, up, up_bias)
    column_norm = torch.linalg.vector_norm(down.detach(), dim=0, dtype=torch.float32).amax()
    return ScaledMLP(cast_weight(up, impl), cast_weight(down, impl), bound, column_norm)


@operator("fp8_mlp_forward")
@without_autocast
def _mlp_forward(
    x: torch.Tensor,
    x_8: torch.Tensor | None,
    x_inverse: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    up_rows: torch.Tensor,
    up_columns: torch.Tensor,
    up_inverse: torch.Tensor,
    down_rows: torch.Tensor,
    down_columns: torch.Tensor,
    down_inverse: torch.Tensor,
    bound: torch.Tensor | None,
    column_norm: torch.Tensor,
    tanh: bool,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and for the backward s without its bias and a."""
    widened = multiply(as_scaled(x, x_8, x_inverse, triton), up_rows, up_inverse)
    activated, activated_8 = gelu.forward_in_8_bits(widened, up_bias, tanh, bound, triton)
    return multiply(activated_8, down_rows, down_inverse), widened, activated


@_mlp_forward.register_fake
def _allocate_mlp(x, x_8, x_inverse, up, up_bias, down, *_):
    widened = x.new_empty(x.shape[0], up.shape[0])
    return x.new_empty(x.shape[0], down.shape[0]), widened, torch.empty_like(widened)


@operator("fp8_mlp_backward")
@without_autocast
def _mlp_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    up_bias: torch.Tensor,
    widened: torch.Tensor,
    activated: torch.Tensor,
    up_columns: torch.Tensor,
    up_inverse: torch.Tensor,
    down_columns: torch.Tensor,
    down_inverse: torch.Tensor,
    column_norm: torch.Tensor,
    tanh: bool,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, and the gradients of up, up_bias and down."""
    dy_8 = cast(dy, triton, dtype=E5M2)
    ddown = torch.mm(dy.t(), activated)
    dactivated = multiply(dy_8, down_columns, down_inverse)
    # |dy| < 2^(TOP + 1) * inverse, which bounds the norm of its rows.
    bound = dy_8.inverse * column_norm * (2.0 ** (TOPS[E5M2] + 1) * math.sqrt(dy.shape[1]) * STEEPEST)
    dwidened, dbias, dwidened_8 = gelu.backward_in_8_bits(dactivated, widened, up_bias, tanh, bound, triton)
    return multiply(dwidened_8, up_columns, up_inverse), torch.mm(dwidened.t(), x), dbias, ddown


@_mlp_backward.register_fake
def _allocate_mlp_backward(dy, x, up_bias, widened, activated, *_):
    dup = x.new_empty(widened.shape[1], x.shape[1])
    return torch.empty_like(x), dup, torch.empty_like(up_bias), x.new_empty(dy.shape[1], widened.shape[1])


def _save_mlp(ctx, inputs, output):
    x, _, _, up, up_bias, down, _, up_columns, up_inverse, _, down_columns, down_inverse = inputs[:12]
    column_norm, ctx.tanh, ctx.triton = inputs[13:]
    _, widened, activated = output
    ctx.mark_non_differentiable(widened, activated)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, up_bias, widened, activated, up_columns, up_inverse, down_columns, down_inverse, column_norm
    )
    ctx.dtypes = up.dtype, down.dtype


def _differentiate_mlp(ctx, dy, *_):
    if dy is None:
        return (None,) * 16
    up_dtype, down_dtype = ctx.dtypes
    dx, dup, dbias, ddown = _mlp_backward(dy.contiguous(), *ctx.saved_tensors, ctx.tanh, ctx.triton)
    return dx, None, None, dup.to(up_dtype), dbias, ddown.to(down_dtype), *(None,) * 10


_mlp_forward.register_autograd(_differentiate_mlp, setup_context=_save_mlp)


def fp8_mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    *,
    approximate: str = "none",
    x_8: Scaled | None = None,
    weights_8: ScaledMLP | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """gelu(x up^T + up_bias) down^T with 8-bit factors. A bias of the second layer is left to what follows.

    Args:
        x: (..., k). up: (f, k), up_bias: (f,), down: (m, f), of any floating dtype; k, f and m are multiples of 16.
        approximate: as in `gelu.bias_gelu`.
        x_8, impl: as in `fp8_linear`. weights_8: of `cast_mlp`, to be shared by calls until the weights change.
    Returns:
        (..., m) in the dtype of x.
    Raises:
        ValueError: sizes that do not fit, a GPU older than sm_89, different devices, or an unknown `approximate`.
    """
    triton = use_triton("fp8_mlp", impl, x, up, up_bias, down)
    for part, weight in ((x, up), (up.t(), down)):
        check("fp8_mlp", part, weight)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"fp8_mlp: approximate={approximate!r} is unknown; use 'none' or 'tanh'")
    if weights_8 is None:
        weights_8 = cast_mlp(up, up_bias, down, impl=impl)
    matrix = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y, _, _ = _mlp_forward(
        matrix, *flatten(x_8), up, up_bias, down, *weights_8.up, *weights_8.down, weights_8.bound,
        weights_8.column_norm, approximate == "tanh", triton,
    )  # fmt: skip
    return y.view(*x.shape[:-1], down.shape[0]).to(x.dtype)
