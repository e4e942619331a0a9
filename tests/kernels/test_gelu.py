"""Bias and GELU in one pass: exactness, and every way to call it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import (
    assert_compiled_equals_eager,
    assert_equal,
    assert_gradients_as_exact_as_torch,
    assert_strides_change_nothing,
    differentiate,
)
from fastroberta_kernels import _dispatch, gelu
from fastroberta_kernels.gelu import BiasGELU, GeGLU, bias_gelu, geglu
from torch.utils.checkpoint import checkpoint

from bench.launch_cases import gelu_cases

needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
both_forms = pytest.mark.parametrize("approximate", ["none", "tanh"])

# x, then bias: None for no bias, fp32 beside bf16 as in training.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp32 without bias": (torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, fp32 bias": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp32, bf16 bias": (torch.float32, torch.bfloat16),
}
# One element, a prime in several dimensions, more rows than one round of the programs, RoBERTa's width, an odd width.
SHAPES = [(1, 1), (2, 3, 61), (75, 40), (3, 3072), (17, 1023)]


def make_inputs(shape, dtypes, device="cpu", seed=0):
    """Data as a network has it: biases of order 1, an outlier channel, values from one flat tail to the other."""
    dtype, bias_dtype = dtypes
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator)
    x[..., shape[-1] // 2] *= 30
    inputs = {"x": x.to(device, dtype).requires_grad_()}
    if bias_dtype is not None:
        bias = torch.randn(shape[-1], generator=generator)
        inputs["bias"] = bias.to(device, bias_dtype).requires_grad_()
    return inputs, torch.randn(shape, generator=generator).to(device, dtype)


def compose(approximate):
    """The operation from PyTorch's own, in the dtype of x."""

    def function(x, bias=None):
        return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)

    return function


def assert_exact(inputs, dy, approximate, impl):
    def function(x, bias=None):
        return bias_gelu(x, bias, approximate=approximate, impl=impl)

    assert_gradients_as_exact_as_torch(function, compose(approximate), inputs, dy)


@both
@both_forms
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_gelu_is_as_exact_as_torch(impl, approximate, dtypes, shape, device):
    inputs, dy = make_inputs(shape, dtypes, device if impl == "triton" else "cpu")
    assert_exact(inputs, dy, approximate, impl)


@needs_triton
@pytest.mark.parametrize("operation", [bias_gelu, geglu], ids=lambda operation: operation.__name__)
def test_the_polynomial_is_as_good_as_fp32(operation, device):
    """The kernels' own normal distribution: value and slope from one tail to the other."""
    s = torch.linspace(-9, 9, 6001, device=device)
    ones = torch.ones_like(s)
    x = (s if operation is bias_gelu else torch.stack((s, ones), -1)).requires_grad_()
    y = operation(x, None, impl="triton").view(-1)
    slope = torch.autograd.grad(y, x, ones)[0].view(len(s), -1)[:, 0]
    wide = s.double().requires_grad_()
    exact = F.gelu(wide)
    exact_slope = torch.autograd.grad(exact.sum(), wide)[0]
    assert (y - exact).abs().max() < 5e-7 and (slope - exact_slope).abs().max() < 5e-7
    middle = s.abs() < 3
    assert (y / exact - 1)[middle & (s != 0)].abs().max() < 1e-4


@both
@both_forms
def test_tails_are_flat(impl, approximate, device):
    """Far out the function is 0 or the identity; nothing overflows on the way."""
    x = torch.tensor([-1e12, -1e4, -50.0, 50.0, 1e4, 1e12], device=device if impl == "triton" else "cpu")
    y = bias_gelu(x.requires_grad_(), torch.zeros_like(x), approximate=approximate, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x.clamp(min=0))
    assert torch.equal(dx, (x > 0).float())


@both
def test_inputs_need_not_be_contiguous(impl, device):
    inputs, dy = make_inputs((4, 6, 40), DTYPES["fp32"], device if impl == "triton" else "cpu")
    assert_strides_change_nothing(lambda **t: bias_gelu(**t, impl=impl), inputs, dy)


@both
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)], ids=str)
def test_empty_tensors(impl, shape, device):
    device = device if impl == "triton" else "cpu"
    inputs = {"x": torch.empty(shape, device=device), "bias": torch.ones(shape[-1:], device=device)}
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    results = differentiate(lambda **t: bias_gelu(**t, impl=impl), inputs, torch.empty(shape, device=device))
    assert results["y"].shape == shape
    for name, tensor in inputs.items():
        assert torch.equal(results[f"d{name}"], torch.zeros_like(tensor)), name


@both
def test_results_repeat_bit_for_bit(impl, device):
    inputs, dy = make_inputs((90, 96), DTYPES["bf16, fp32 bias"], device if impl == "triton" else "cpu")
    first, second = (differentiate(lambda **t: bias_gelu(**t, impl=impl), inputs, dy) for _ in range(2))
    assert_equal(first, second)


@needs_triton
def test_only_x_and_bias_are_saved(device):
    """What a composition from PyTorch saves in addition, the sum, is as large as x."""
    inputs, _ = make_inputs((4, 32), DTYPES["bf16, fp32 bias"], device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        bias_gelu(**inputs, impl="triton")
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in inputs.values())


@both
def test_checkpoint_recomputes_the_same(impl, device):
    inputs, dy = make_inputs((6, 48), DTYPES["fp32"], device if impl == "triton" else "cpu")

    def function(x, bias):
        return bias_gelu(x, bias, impl=impl)

    plain = differentiate(function, inputs, dy)
    recomputed = differentiate(lambda **t: checkpoint(function, *t.values(), use_reentrant=False), inputs, dy)
    assert_equal(plain, recomputed)


@both
@both_forms
def test_compiled_equals_eager(impl, approximate, device):
    inputs, dy = make_inputs((5, 48), DTYPES["bf16"], device if impl == "triton" else "cpu")

    def function(**tensors):
        return bias_gelu(**tensors, approximate=approximate, impl=impl)

    assert_compiled_equals_eager(function, inputs, dy, impl)


@needs_triton
@pytest.mark.parametrize("dtypes", ["bf16, fp32 bias", "fp32 without bias"])
def test_operators_are_registered_rightly(dtypes, device):
    inputs, dy = make_inputs((5, 48), DTYPES[dtypes], device)
    x, bias = inputs["x"], inputs.get("bias")
    torch.library.opcheck(gelu._bias_gelu_forward.registered, (x, bias, False))
    torch.library.opcheck(
        gelu._bias_gelu_backward.registered, (dy, x.detach(), None if bias is None else bias.detach(), True)
    )


def test_module_adds_its_bias():
    module = BiasGELU(24)
    assert [(name, tensor.shape) for name, tensor in module.state_dict().items()] == [("bias", (24,))]
    x = torch.randn(3, 24)
    assert torch.equal(module(x), F.gelu(x))
    module.bias.data.fill_(0.5)
    assert torch.equal(module(x), F.gelu(x + 0.5))
    assert torch.equal(BiasGELU(24, approximate="tanh")(x), F.gelu(x, approximate="tanh"))


def test_wrong_arguments_are_named():
    x, bias = torch.randn(3, 24), torch.ones(24)
    with pytest.raises(ValueError, match=r"bias_gelu: bias is \(23,\), x is \(3, 24\)"):
        bias_gelu(x, bias[1:])
    with pytest.raises(ValueError, match="approximate='erf' is unknown; use 'none' or 'tanh'"):
        bias_gelu(x, bias, approximate="erf")
    with pytest.raises(ValueError, match=r"x is torch\.int64; use float32"):
        bias_gelu(x.long(), bias)
    with pytest.raises(ValueError, match="unknown"):
        bias_gelu(x, bias, impl="cuda")
    with pytest.raises(ValueError, match="tensor argument 1 is on meta"):
        bias_gelu(x, bias.to("meta"))


@needs_triton
def test_kernel_refuses_fp64(device):
    x = torch.ones(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        bias_gelu(x, x[0], impl="triton")


@needs_triton
def test_launch_cases_reach_both_kernels_in_both_forms():
    with _dispatch.record_launches() as launches:
        for case in gelu_cases():
            case()
    seen = {(launch.kernel.__name__, launch.options.get("TANH")) for launch in launches}
    kernels = [f"_{name}_{way}_kernel" for name in ("bias_gelu", "geglu") for way in ("forward", "backward")]
    assert seen == {(name, tanh) for name in kernels for tanh in (False, True)} | {("_sum_partials_kernel", None)}


# ---- GeGLU -----------------------------------------------------------------------------------------------------------


def make_gated_inputs(shape, dtypes, device="cpu"):
    """x with 2N columns, of which the gate's are not those of the other tests; dy with N."""
    inputs, dy = make_inputs((*shape[:-1], 2 * shape[-1]), dtypes, device)
    return inputs, dy[..., : shape[-1]].contiguous()


def compose_gated(approximate):
    def function(x, bias=None):
        a, b = (x if bias is None else x + bias.to(x.dtype)).chunk(2, -1)
        return F.gelu(a, approximate=approximate) * b

    return function


def assert_gated_exact(shape, dtypes, approximate, impl, device):
    inputs, dy = make_gated_inputs(shape, dtypes, device if impl == "triton" else "cpu")
    assert_gradients_as_exact_as_torch(
        lambda **t: geglu(**t, approximate=approximate, impl=impl), compose_gated(approximate), inputs, dy
    )


@both
@both_forms
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 61), (75, 40)], ids=str)
def test_geglu_is_as_exact_as_torch(impl, approximate, dtypes, shape, device):
    assert_gated_exact(shape, dtypes, approximate, impl, device)


@both
@pytest.mark.parametrize("num_columns", [1152, 259])  # ModernBERT's; an odd width of two blocks
def test_geglu_of_several_blocks(impl, num_columns, device):
    assert_gated_exact((9, num_columns), DTYPES["bf16, fp32 bias"], "none", impl, device)


@both
def test_geglu_under_every_way_to_call_it(impl, device):
    inputs, dy = make_gated_inputs((4, 6, 24), DTYPES["fp32"], device if impl == "triton" else "cpu")

    def function(x, bias):
        return geglu(x, bias, impl=impl)

    assert_strides_change_nothing(function, inputs, dy)
    assert_compiled_equals_eager(function, inputs, dy, impl)
    plain = differentiate(function, inputs, dy)
    assert_equal(plain, differentiate(lambda **t: checkpoint(function, *t.values(), use_reentrant=False), inputs, dy))
    for shape in ((0, 16), (3, 0)):
        empty = {"x": torch.empty(shape, device=dy.device), "bias": torch.ones(shape[-1:], device=dy.device)}
        empty = {name: tensor.requires_grad_() for name, tensor in empty.items()}
        results = differentiate(function, empty, torch.empty(shape[0], shape[1] // 2, device=dy.device))
        assert results["y"].shape == (shape[0], shape[1] // 2) and not results["dbias"].any()


@needs_triton
def test_geglu_is_registered_rightly_and_saves_its_inputs_only(device):
    inputs, dy = make_gated_inputs((5, 24), DTYPES["bf16, fp32 bias"], device)
    torch.library.opcheck(gelu._geglu_forward.registered, (*inputs.values(), False))
    torch.library.opcheck(gelu._geglu_backward.registered, (dy, *(t.detach() for t in inputs.values()), True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        geglu(**inputs, impl="triton")
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in inputs.values())


def test_geglu_module_and_wrong_arguments():
    x = torch.randn(3, 24)
    for approximate in ("none", "tanh"):
        module = GeGLU(approximate)
        assert torch.equal(module(x), compose_gated(approximate)(x)) and approximate in repr(module)
    with pytest.raises(ValueError, match=r"geglu: x is \(3, 23\); its last dimension must be even"):
        geglu(x[:, 1:])
    with pytest.raises(ValueError, match=r"geglu: bias is \(12,\)"):
        geglu(x, x[0, :12])


@pytest.mark.gpu
@both_forms
@pytest.mark.parametrize("num_columns", [1, 1023, 1152, 2624])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_geglu_is_as_exact_as_torch_at_real_sizes(approximate, num_columns, dtypes, device):
    assert_gated_exact((4099, num_columns), dtypes, approximate, "triton", device)


@pytest.mark.gpu
@both_forms
@pytest.mark.parametrize("num_columns", [1, 768, 1023, 3072, 4096])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_every_configuration_is_as_exact_as_torch_at_real_sizes(approximate, num_columns, dtypes, device):
    inputs, dy = make_inputs((4099, num_columns), dtypes, device)
    assert_exact(inputs, dy, approximate, "triton")


@pytest.mark.gpu
def test_backward_repeats_a_hundred_times(device):
    inputs, dy = make_inputs((8192, 3072), DTYPES["bf16, fp32 bias"], device)
    first = differentiate(bias_gelu, inputs, dy)
    for _ in range(100):
        for name, tensor in differentiate(bias_gelu, inputs, dy).items():
            assert torch.equal(first[name], tensor), name


@pytest.mark.gpu
def test_graph_replay_equals_eager(device):
    inputs, dy = make_inputs((64, 3072), DTYPES["bf16, fp32 bias"], device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        differentiate(bias_gelu, inputs, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate(bias_gelu, inputs, dy)
    with torch.no_grad():
        inputs["x"].mul_(0.5)
    graph.replay()
    eager = differentiate(bias_gelu, inputs, dy)
    assert_equal(captured, eager)


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_two_to_the_31_elements(device):
    """The last rows lie past what a 32-bit offset reaches."""
    num_rows = 2**31 // 3072 + 64
    x = torch.randn(num_rows, 3072, device=device, dtype=torch.bfloat16).requires_grad_()
    bias = torch.randn(3072, device=device)
    y = bias_gelu(x, bias)
    (dx,) = torch.autograd.grad(y, x, x.detach())
    tail = x[-100:].detach().requires_grad_()
    y_tail = bias_gelu(tail, bias)
    (dx_tail,) = torch.autograd.grad(y_tail, tail, tail.detach())
    assert torch.equal(y[-100:], y_tail)
    assert torch.equal(dx[-100:], dx_tail)
