"""Linear layers and the MLP in 8 bits: what is rounded, to which numbers, and every way to call them."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_compiled_equals_eager, assert_equal, differentiate
from fastroberta_kernels import _dispatch, fp8
from fastroberta_kernels import fp8_mlp as fp8_mlp_module
from fastroberta_kernels.fp8 import (
    E4M3,
    E5M2,
    TOPS,
    FP8Linear,
    Scaled,
    bound_layer_norm,
    bound_linear,
    cast,
    cast_weight,
    fp8_linear,
)
from fastroberta_kernels.fp8_mlp import cast_mlp, fp8_mlp
from fastroberta_kernels.gelu import bias_gelu, forward_in_8_bits
from fastroberta_kernels.layer_norm import dropout_add_layer_norm
from torch.utils.checkpoint import checkpoint

needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
formats = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_exact(shape, dtype, power=-3, seed=0):
    """Numbers that the format holds at their scale."""
    generator = torch.Generator().manual_seed(seed)
    largest = 2.0 ** (TOPS[dtype] + 1)
    x = (torch.randn(shape, generator=generator) * largest / 4).clamp(-0.9 * largest, 0.9 * largest).to(dtype).float()
    x.view(-1)[0] = largest * 0.75
    return x * 2.0**power


def dequantize(x: Scaled) -> torch.Tensor:
    return x.data.double() * x.inverse.double()


def round_to(x, dtype):
    """The nearest number of the format under a scale that leaves nothing to clip, in fp64."""
    bound = x.abs().max().double()
    scale = 2.0 ** (TOPS[dtype] - bound.log2().floor())
    return (x.double() * scale).float().to(dtype).double() / scale


@both
@formats
@pytest.mark.parametrize("shape", [(1, 16), (20, 300), (3, 5, 32), (130, 16)], ids=str)
def test_cast_keeps_what_the_format_holds(impl, dtype, shape, device):
    x = make_exact(shape, dtype).to(device if impl == "triton" else "cpu")
    for given, bound in (x, None), (x.bfloat16(), None), (x, x.abs().max() * 1.05):
        rounded = cast(given, impl == "triton", bound, dtype)
        assert rounded.data.dtype == dtype and rounded.inverse.shape == ()
        assert torch.equal(dequantize(rounded).float(), x)


@formats
def test_cast_rounds_to_the_nearest_and_a_loose_bound_costs_range_only(dtype):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    exact, loose = cast(x, False, dtype=dtype), cast(x, False, x.abs().max() * 64, dtype)
    assert torch.equal(dequantize(exact), round_to(x, dtype))
    assert loose.inverse == 64 * exact.inverse
    is_normal = x.abs() > loose.inverse * torch.finfo(dtype).smallest_normal
    assert is_normal.float().mean() > 0.9
    assert torch.equal(dequantize(loose)[is_normal], dequantize(exact)[is_normal])


@both
@formats
def test_extremes(impl, dtype, device):
    """Zeros, the largest and the smallest numbers stay what they are; what is not finite is never made finite."""
    device = device if impl == "triton" else "cpu"
    for value in (0.0, 1.75 * 2.0**127, 2.0**-100):
        x = torch.full((1, 16), value, device=device)
        assert torch.equal(dequantize(cast(x, impl == "triton", dtype=dtype)).float(), x)
    x = torch.full((1, 16), torch.inf, device=device)
    assert cast(x, impl == "triton", dtype=dtype).inverse.isnan()
    assert cast(x[:0], impl == "triton", dtype=dtype).data.shape == (0, 16)


@both
def test_weights_are_kept_in_both_layouts(impl, device):
    weight = make_exact((96, 80), E4M3).to(device if impl == "triton" else "cpu")
    rows, columns, inverse = cast_weight(weight, impl)
    assert torch.equal(dequantize(Scaled(rows, inverse)).float(), weight)
    assert torch.equal(rows.float().t(), columns.float()) and columns.is_contiguous()
    (first, _, _), (_, second, _) = cast_weight(weight, impl).split(32, 64)
    assert torch.equal(first.float(), rows[:32].float()) and torch.equal(second.float(), columns[:, 32:].float())


def make_linear(seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    inputs = {"x": draw(4, 6, 32), "weight": draw(48, 32, scale=0.2), "bias": draw(48)}
    return inputs, draw(4, 6, 48, scale=1e-6).detach()


def assert_close(actual, expected, factor=1.0):
    """To the roundings of bf16 on the way."""
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < factor * 2**-8, f"{error:.2e}"


def test_linear_is_the_product_of_rounded_factors_with_its_gradients():
    inputs, dy = make_linear()
    results = differentiate(fp8_linear, inputs, dy)
    x, weight, bias = (tensor.detach().double() for tensor in inputs.values())
    flat, gradient = x.flatten(0, 1), dy.double().flatten(0, 1)
    weight_4 = round_to(weight, E4M3)
    assert_close(results["y"].flatten(0, 1), round_to(flat, E4M3) @ weight_4.T + bias)
    assert_close(results["dx"].flatten(0, 1), round_to(gradient, E5M2) @ weight_4)
    assert_close(results["dweight"], gradient.T @ flat)
    assert_close(results["dbias"], gradient.sum(0))
    # The roundings are there at all: e4m3 has 4 bits of precision, e5m2 3.
    exact = flat @ weight.T + bias
    assert 0.01 < (results["y"].flatten(0, 1).double() - exact).norm() / exact.norm() < 0.05
    exact = gradient @ weight
    assert 0.02 < (results["dx"].flatten(0, 1).double() - exact).norm() / exact.norm() < 0.1


def in_bf16(x):
    """What is kept between two products."""
    return x.bfloat16().double()


def make_mlp(dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    inputs = {
        "x": draw(3, 10, 32), "up": draw(64, 32, scale=0.2), "up_bias": draw(64, scale=0.3),
        "down": draw(48, 64, scale=0.2),
    }  # fmt: skip
    return inputs, draw(3, 10, 48, scale=1e-6).detach()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("has_bound", [False, True])
def test_mlp_is_made_of_rounded_factors_with_its_gradients(approximate, has_bound):
    inputs, dy = make_mlp()
    x, up, up_bias, down = (tensor.detach().double() for tensor in inputs.values())
    flat, gradient = x.flatten(0, 1), dy.double().flatten(0, 1)
    row_norm = flat.norm(dim=1).max().float() if has_bound else None
    weights = cast_mlp(*(inputs[name] for name in ("up", "up_bias", "down")), row_norm)
    results = differentiate(functools.partial(fp8_mlp, approximate=approximate, weights_8=weights), inputs, dy)

    up_4, down_4 = round_to(up, E4M3), round_to(down, E4M3)
    s = in_bf16(in_bf16(round_to(flat, E4M3) @ up_4.T) + up_bias).requires_grad_()
    a = F.gelu(s, approximate=approximate)
    ds = in_bf16(torch.autograd.grad(a, s, in_bf16(round_to(gradient, E5M2) @ down_4))[0])
    a = in_bf16(a.detach())
    if has_bound:
        assert a.abs().max() <= weights.bound <= 64 * a.abs().max()
    assert_close(results["y"].flatten(0, 1), round_to(a, E4M3) @ down_4.T)
    assert_close(results["dx"].flatten(0, 1), round_to(ds, E5M2) @ up_4)
    assert_close(results["dup"], ds.T @ flat)
    assert_close(results["ddown"], gradient.T @ a)
    assert_close(results["dup_bias"], ds.sum(0))


@needs_triton
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_kernels_of_the_mlp_agree_with_torch(approximate, device):
    """The kernels keep fp32 up to each rounding, so a few numbers fall on the other side of a border."""
    inputs, dy = make_mlp()
    weights = [inputs[name] for name in ("up", "up_bias", "down")]
    ours, theirs = (
        differentiate(
            functools.partial(fp8_mlp, approximate=approximate, impl=impl,
                              weights_8=cast_mlp(*weights, torch.tensor(9.0), impl=impl)), inputs, dy,
        )
        for impl in ("triton", "torch")
    )  # fmt: skip
    for name, value in theirs.items():
        assert_close(ours[name], value.double(), 6)


@both
@pytest.mark.parametrize("shape", [(5, 48), (1, 2, 768), (3, 1023)], ids=str)
def test_layer_norm_writes_8_bits_beside_16(impl, shape, device):
    """y is to the bit what it is without, and its 8 bits are those of a cast with the same bound."""
    device = device if impl == "triton" else "cpu"
    x, residual = torch.randn(2, *shape, device=device, dtype=torch.bfloat16).unbind()
    weight, bias = torch.rand(shape[-1], device=device), torch.randn(shape[-1], device=device)
    bound = bound_layer_norm(weight, bias)
    x.requires_grad_()
    function = functools.partial(dropout_add_layer_norm, p=0.1, seed=3, impl=impl)
    y, y_8 = function(x, residual, weight, bias, bound=bound)
    assert y.abs().max() <= bound * 1.01
    assert torch.equal(y, function(x, residual, weight, bias))
    expected = cast(y.detach(), False, bound)
    assert y_8.inverse == expected.inverse
    # The kernel rounds y once, from fp32; the twin from bf16, where one number in 16 lies between two of e4m3.
    differs = y_8.data.float() != expected.data.float()
    assert not differs.any() if impl == "torch" else differs.float().mean() < 0.08
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(function(x, residual, weight, bias).sum(), x)[0])


def test_bounds_hold():
    """Of rows that reach them: all of a row's mass in one place, along a weight's row."""
    weight, bias = torch.rand(64) + 0.5, torch.randn(64)
    x = torch.zeros(64, 64).fill_diagonal_(1e4)
    y = F.layer_norm(x, (64,), weight, bias)
    assert 0.9 * y.abs().max() <= bound_layer_norm(weight, bias) <= 1.3 * y.abs().max()
    row_norm = bound_layer_norm(weight, bias, order=2)
    assert y.norm(dim=1).max() <= row_norm
    matrix, shift = torch.cat((y, torch.randn(64, 64))), torch.randn(128)
    z = F.linear(y, matrix, shift)
    assert z.abs().max() <= bound_linear(row_norm, matrix, shift) <= 3 * z.abs().max()


def test_what_is_not_finite_reaches_the_loss_and_the_gradients():
    inputs, dy = make_linear()
    with torch.no_grad():
        inputs["x"][0, 0, 0] = torch.inf
    assert fp8_linear(**inputs).isnan().all()
    inputs, dy = make_linear()
    dy[0, 0, 0] = torch.inf
    assert not differentiate(fp8_linear, inputs, dy)["dx"].isfinite().any()


def call_linear(x, weight, bias, impl):
    return fp8_linear(x, weight, bias, impl=impl)


def call_mlp(x, up, up_bias, down, impl):
    return fp8_mlp(x, up, up_bias, down, impl=impl)


CALLS = pytest.mark.parametrize("make, call", [(make_linear, call_linear), (make_mlp, call_mlp)], ids=["linear", "mlp"])


@pytest.mark.parametrize(
    "make, call, impl",
    [(make_mlp, call_mlp, "torch"), pytest.param(make_linear, call_linear, "triton", marks=needs_triton)],
    ids=["mlp-torch", "linear-triton"],
)
def test_torch_compile_and_checkpoint_change_nothing(make, call, impl, device):
    inputs, dy = make()
    function = functools.partial(call, impl=impl)
    assert_compiled_equals_eager(lambda **t: call(**t, impl=impl), inputs, dy, impl)
    plain = differentiate(function, inputs, dy)
    again = differentiate(lambda **t: checkpoint(function, *t.values(), use_reentrant=False), inputs, dy)
    assert_equal(plain, again)


@CALLS
def test_parameters_in_fp32_and_other_inputs(make, call):
    """Under fp32 parameters, as in a module, gradients are fp32; x of another dtype gives y of it."""
    inputs, dy = make(dtype=torch.float32)
    results = differentiate(functools.partial(call, impl=None), inputs, dy)
    assert {value.dtype for value in results.values()} == {torch.float32}
    half, dy = make()
    for name, value in differentiate(functools.partial(call, impl=None), half, dy.bfloat16()).items():
        assert_close(results[name], value.double(), 16)


def test_module_is_a_linear_layer():
    module, plain = FP8Linear(32, 48), torch.nn.Linear(32, 48)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(5, 32)
    assert_close(module(x), plain(x).double(), 12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fp8_linear(torch.ones(2, 16), torch.ones(16, 32)), r"x is \(2, 16\), the weight \(16, 32\)"),
        (lambda: fp8_linear(torch.ones(2, 24), torch.ones(16, 24)), "multiples of 16 in both dimensions"),
        (lambda: fp8_mlp(*map(torch.ones, ((2, 16), (32, 16), 32, (16, 48)))), r"the weight \(16, 48\)"),
        (lambda: fp8_mlp(*map(torch.ones, ((2, 16), (32, 16), 32, (16, 32))), approximate="x"), "approximate='x'"),
        (lambda: fp8_linear(torch.ones(2, 16), torch.ones(16, 16), impl="cuda"), "impl='cuda' is unknown"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bias_gelu_of_the_mlp_is_the_kernel_of_gelu():
    """The 16-bit result of the forward in 8 bits is that of `bias_gelu`, to the bit."""
    x, bias = torch.randn(20, 300).bfloat16(), torch.randn(300)
    for impl in ("torch", "triton") if _dispatch.triton is not None else ("torch",):
        y, y_8 = forward_in_8_bits(x, bias, False, torch.tensor(8.0), impl == "triton")
        assert torch.equal(y, bias_gelu(x, bias, impl=impl))
        assert_close(dequantize(y_8), y.double(), 8)


def test_opcheck():
    """All but the check of the schema, which multiplies its arguments: PyTorch has no such operation in 8 bits."""
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    inputs, _ = make_linear()
    weight_8 = cast_weight(inputs["weight"])
    x = inputs["x"].detach().flatten(0, 1).requires_grad_()
    torch.library.opcheck(
        fp8._linear_forward.registered,
        (x, None, None, inputs["weight"], inputs["bias"], *weight_8, False),
        test_utils=checks,
    )
    inputs, _ = make_mlp()
    x, up, up_bias, down = inputs.values()
    cast_8 = cast_mlp(up, up_bias, down)
    x = x.detach().flatten(0, 1).requires_grad_()
    arguments = (x, None, None, up, up_bias, down, *cast_8.up, *cast_8.down, None, cast_8.column_norm, False, False)
    torch.library.opcheck(fp8_mlp_module._mlp_forward.registered, arguments, test_utils=checks)
