"""LayerNorm, alone and with bias, dropout and residual: exactness, dropout decisions, every way to call it."""

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
from fastroberta_kernels import _dispatch, _rows, layer_norm, philox
from fastroberta_kernels.layer_norm import DropoutAddLayerNorm, LayerNorm, dropout_add_layer_norm
from torch.utils.checkpoint import checkpoint

from bench.launch_cases import layer_norm_cases

needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
both_slowly = pytest.mark.parametrize(
    "impl", ["torch", pytest.param("triton", marks=[needs_triton, pytest.mark.slow(reason="30 seconds")])]
)

# bfloat16 twice: parameters in fp32, as in training, and in the dtype of x; then a residual wider than x.
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float32),
    "bf16, fp32 parameters": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16, fp32 residual and parameters": (torch.bfloat16, torch.float32, torch.float32),
    "fp32, bf16 residual and parameters": (torch.float32, torch.bfloat16, torch.bfloat16),
}
# One column (the variance is zero), fewer than one vector load, a prime, a narrow multiple of 16, RoBERTa's widths, an odd
# width of two blocks. The rows are fewer than a tile of the kernel, or more than one round of its programs, and odd.
SHAPES = [(3, 1), (2, 5, 7), (23, 61), (23, 48), (2, 7, 768), (5, 1025), (3, 1024)]


def make_inputs(shape, dtypes, device="cpu", seed=0):
    """Data as a network has it: biases of order 1, an outlier channel, rows whose mean is far from zero."""
    dtype, residual_dtype, parameter_dtype = dtypes
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x, residual = normal(*shape), normal(*shape)
    x[..., shape[-1] // 2] *= 30
    residual[..., ::2, :] += 100 if residual_dtype == torch.float32 else 4
    inputs = {
        "x": x.to(dtype),
        "residual": residual.to(residual_dtype),
        "weight": (1 + 0.5 * normal(shape[-1])).to(parameter_dtype),
        "bias": normal(shape[-1]).to(parameter_dtype),
        "x_bias": normal(shape[-1]).to(parameter_dtype),
    }
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in inputs.items()}
    return inputs, normal(*shape).to(device, dtype)


def compose(p, eps=1e-5, seed=0):
    """The operation from PyTorch's own, in the dtypes of its inputs, with the given dropout decisions."""

    def function(x, weight, bias, residual=None, x_bias=None):
        z = x if x_bias is None else x + x_bias.to(x.dtype)
        if p > 0:
            keep = philox.dropout_keep_torch(philox.as_seed(seed, x.device), p, x[..., 0].numel(), x.shape[-1])
            z = z * keep.view(x.shape) * philox.dropout_scale(p)
        if residual is not None:
            z = residual + z
        dtype = z.dtype if weight.dtype not in (z.dtype, torch.float32) else weight.dtype
        return F.layer_norm(z, z.shape[-1:], weight.to(dtype), bias.to(dtype), eps).to(x.dtype)

    return function


def assert_exact(impl, inputs, dy, p):
    def function(**tensors):
        return dropout_add_layer_norm(**tensors, p=p, seed=11, impl=impl)

    assert_gradients_as_exact_as_torch(function, compose(p, seed=11), inputs, dy, f"p={p} ")


def list_cases(dtypes_by_name):
    """Every shape in fp32, every dtype in one shape. All other pairs run the same code, slowly in the interpreter."""
    for shape in SHAPES:
        for name, dtypes in dtypes_by_name.items():
            yield pytest.param("torch", dtypes, shape, id=f"{shape}-{name}-torch")
            marks = [needs_triton]
            if name != "fp32" and shape != (2, 5, 7):
                marks.append(pytest.mark.slow(reason="3 seconds"))
            yield pytest.param("triton", dtypes, shape, id=f"{shape}-{name}-triton", marks=marks)


@pytest.mark.parametrize("impl, dtypes, shape", list(list_cases(DTYPES)))
def test_dropout_add_layer_norm_is_as_exact_as_torch(impl, dtypes, shape, device):
    if impl == "triton" and shape[-1] >= 768 and dtypes[0] == torch.float16 and not torch.cuda.is_available():
        pytest.skip("slow in the interpreter; narrow shapes hold this dtype")
    if impl == "torch" and shape[-1] == 1 and dtypes[0] != torch.float32:
        pytest.skip("the exact dweight is zero, ATen's in fp32 is a rounding error: no unit to measure by")
    inputs, dy = make_inputs(shape, dtypes, device if impl == "triton" else "cpu")
    for p in (0.0, 0.1):
        assert_exact(impl, inputs, dy, p)


@pytest.mark.parametrize("impl, dtype, shape", list(list_cases({"fp32": torch.float32, "bf16": torch.bfloat16})))
def test_layer_norm_is_as_exact_as_torch(impl, dtype, shape, device):
    inputs, dy = make_inputs(shape, (dtype, dtype, torch.float32), device if impl == "triton" else "cpu")
    inputs = {name: inputs[name] for name in ("x", "weight", "bias")}
    assert_gradients_as_exact_as_torch(lambda **t: layer_norm.layer_norm(**t, impl=impl), compose(0.0), inputs, dy)


@both_slowly
def test_gradients_of_parameters_are_added_up_in_fp32(impl, device):
    """Added up in bf16 they would be several percent off, as those of ATen are on a CPU."""
    inputs, dy = make_inputs((2048, 32), DTYPES["bf16, fp32 parameters"], device if impl == "triton" else "cpu")
    for p in (0.0, 0.1):
        ours = differentiate(
            lambda p=p, **tensors: dropout_add_layer_norm(**tensors, p=p, seed=11, impl=impl), inputs, dy
        )
        exact_inputs = {name: tensor.detach().double().cpu().requires_grad_() for name, tensor in inputs.items()}
        exact = differentiate(compose(p, seed=11), exact_inputs, dy.double().cpu())
        for name in ("dweight", "dbias"):
            error = (ours[name].double().cpu() - exact[name]).norm() / exact[name].norm()
            assert error < 5e-3, f"p={p} {name}: {error:.1e}"


@both
def test_large_mean_costs_no_accuracy(impl, device):
    """A variance computed as E[z^2] - E[z]^2 would be off by a percent here."""
    inputs, dy = make_inputs((8, 768), DTYPES["fp32"], device if impl == "triton" else "cpu")
    x = (torch.randn(8, 768, generator=torch.Generator().manual_seed(1)) + 1000).to(inputs["x"].device)
    inputs = {"x": x.requires_grad_(), "weight": inputs["weight"], "bias": inputs["bias"]}
    assert_gradients_as_exact_as_torch(lambda **t: layer_norm.layer_norm(**t, impl=impl), compose(0.0), inputs, dy)


@both
@pytest.mark.parametrize("num_columns", [48, 5000])  # a row as a whole, and block by block
def test_epsilon_counts_in_rows_of_small_variance(impl, num_columns, device):
    inputs, dy = make_inputs((3, num_columns), DTYPES["fp32"], device if impl == "triton" else "cpu")
    x = (inputs["x"].detach() / 1000).requires_grad_()
    inputs = {"x": x, "weight": inputs["weight"], "bias": inputs["bias"]}
    assert_gradients_as_exact_as_torch(lambda **t: layer_norm.layer_norm(**t, impl=impl), compose(0.0), inputs, dy)


@both
@pytest.mark.parametrize("num_columns", [37, 768])
def test_dropout_decisions_are_those_of_philox(impl, num_columns, device):
    """Forward and backward drop exactly what `philox` says, and the seed's first row shifts the decisions."""
    device = device if impl == "triton" else torch.device("cpu")
    seed = torch.tensor([1234, 2**33], device=device)
    ramp = torch.linspace(0, 1, num_columns, device=device)
    x = (1000 * torch.ones(2, 3, num_columns, device=device)).requires_grad_()
    residual = ramp.expand(2, 3, num_columns).clone().requires_grad_()
    weight, bias = torch.ones(num_columns, device=device), torch.zeros(num_columns, device=device)
    keep = philox.dropout_keep_torch(seed, 0.25, 6, num_columns).view(2, 3, num_columns)
    y = dropout_add_layer_norm(x, residual, weight, bias, p=0.25, seed=seed, impl=impl)
    assert torch.equal(y > 0, keep)  # kept values lie far above the mean, dropped ones below
    dx, dresidual = torch.autograd.grad((y * ramp).sum(), (x, residual))
    assert torch.equal(dx != 0, keep)
    assert torch.equal(dx[keep], (dresidual * philox.dropout_scale(0.25))[keep])
    # The second half of the batch alone, told its first row, draws what it drew in the whole.
    second = dropout_add_layer_norm(
        x[1], residual[1], weight, bias, p=0.25, seed=seed + torch.tensor([0, 3], device=device), impl=impl
    )
    assert torch.equal(second, y[1])


@both
def test_dropping_everything_leaves_the_residual(impl, device):
    inputs, _ = make_inputs((3, 33), DTYPES["fp32"], device if impl == "triton" else "cpu")
    y = dropout_add_layer_norm(**inputs, p=1.0, seed=0, impl=impl)
    expected = layer_norm.layer_norm(inputs["residual"], inputs["weight"], inputs["bias"], impl=impl)
    assert torch.equal(y, expected)


@needs_triton
def test_one_gradient_serves_x_and_residual_without_dropout(device):
    inputs, dy = make_inputs((4, 40), DTYPES["bf16"], device)
    y = dropout_add_layer_norm(**inputs, impl="triton")
    dx, dresidual = torch.autograd.grad(y, (inputs["x"], inputs["residual"]), dy)
    assert dx.data_ptr() == dresidual.data_ptr()


@needs_triton
def test_wide_rows(device):
    """Above 4096 columns rows are taken a block at a time, however they are aligned."""
    inputs, dy = make_inputs((3, 5008), DTYPES["fp32"], device)
    assert_exact("triton", inputs, dy, 0.1)


@needs_triton
def test_partial_sums_are_added_whole(device):
    """More partial sums than one step of the kernel takes, columns that are no multiple of its block."""
    partials = torch.arange(3 * 300 * 37, dtype=torch.float32, device=device).reshape(3, 300, 37) % 1021
    outputs = tuple(torch.empty(37, device=device) for _ in range(3))
    _rows.sum_partials(partials, outputs)
    assert torch.equal(torch.stack(outputs), partials.sum(1))  # integers: exact in any order


@both_slowly
def test_inputs_need_not_be_contiguous(impl, device):
    inputs, dy = make_inputs((4, 6, 40), DTYPES["fp32"], device if impl == "triton" else "cpu")
    assert_strides_change_nothing(lambda **t: dropout_add_layer_norm(**t, p=0.1, seed=5, impl=impl), inputs, dy)


@both
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)], ids=str)
def test_empty_tensors(impl, shape, device):
    inputs, dy = make_inputs_empty(shape, device if impl == "triton" else "cpu")
    results = differentiate(lambda **t: dropout_add_layer_norm(**t, p=0.1, seed=5, impl=impl), inputs, dy)
    assert results["y"].shape == shape
    for name, tensor in inputs.items():
        assert torch.equal(results[f"d{name}"], torch.zeros_like(tensor)), name


def make_inputs_empty(shape, device):
    vectors = {name: torch.ones(shape[-1:], device=device) for name in ("weight", "bias", "x_bias")}
    tensors = {"x": torch.empty(shape, device=device), "residual": torch.empty(shape, device=device), **vectors}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, torch.empty(shape, device=device)


@both
def test_results_repeat_bit_for_bit(impl, device):
    inputs, dy = make_inputs((37, 96), DTYPES["bf16, fp32 parameters"], device if impl == "triton" else "cpu")
    first, second = (
        differentiate(lambda **t: dropout_add_layer_norm(**t, p=0.1, seed=5, impl=impl), inputs, dy) for _ in range(2)
    )
    assert_equal(first, second)


@both
def test_checkpoint_draws_the_same_dropout(impl, device):
    inputs, dy = make_inputs((6, 48), DTYPES["fp32"], device if impl == "triton" else "cpu")
    seed = torch.tensor([77], device=dy.device)

    def function(x, residual, weight, bias, x_bias):
        return dropout_add_layer_norm(x, residual, weight, bias, p=0.3, x_bias=x_bias, seed=seed, impl=impl)

    plain = differentiate(function, inputs, dy)
    recomputed = differentiate(lambda **t: checkpoint(function, *t.values(), use_reentrant=False), inputs, dy)
    assert_equal(plain, recomputed)


@both
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled_equals_eager(impl, p, device):
    inputs, dy = make_inputs((5, 48), DTYPES["bf16"], device if impl == "triton" else "cpu")
    seed = torch.tensor([5, 0], device=dy.device) if p else None

    def function(**tensors):
        return dropout_add_layer_norm(**tensors, p=p, seed=seed, impl=impl)

    assert_compiled_equals_eager(function, inputs, dy, impl)


@needs_triton
@pytest.mark.parametrize("p, dtypes", [(0.0, "bf16"), (0.1, "bf16, fp32 residual and parameters")])
def test_operators_are_registered_rightly(p, dtypes, device):
    inputs, dy = make_inputs((5, 48), DTYPES[dtypes], device)
    seed = torch.tensor([5, 0], device=device) if p else None
    order = ("x", "residual", "x_bias", "weight", "bias")
    torch.library.opcheck(layer_norm._layer_norm_forward.registered, (*(inputs[name] for name in order), seed, p, 1e-5))
    values = [inputs[name].detach() for name in order]
    _, statistics = layer_norm._layer_norm_forward(*values, seed, p, 1e-5)
    torch.library.opcheck(layer_norm._layer_norm_backward.registered, (dy, *values, seed, statistics, p))


def test_modules_are_drop_in():
    """Names, defaults and results of torch.nn.LayerNorm; dropout in training mode only."""
    ours, theirs = LayerNorm(24), torch.nn.LayerNorm(24)
    assert ours.eps == theirs.eps
    theirs.weight.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, residual, x_bias = torch.randn(3, 24), torch.randn(3, 24), torch.randn(24)
    assert torch.equal(ours(x), theirs(x))
    fused = DropoutAddLayerNorm(24)
    fused.load_state_dict(theirs.state_dict())
    dropped = dropout_add_layer_norm(x, residual, theirs.weight, theirs.bias, p=0.1, x_bias=x_bias, seed=9)
    assert torch.equal(fused(x, residual, x_bias, seed=9), dropped)
    assert torch.equal(fused.eval()(x, residual, x_bias), theirs(residual + (x + x_bias)))


def test_wrong_arguments_are_named():
    x, weight = torch.randn(3, 24), torch.ones(24)
    with pytest.raises(ValueError, match=r"layer_norm: weight is \(23,\), x is \(3, 24\); weight must be \(24,\)"):
        layer_norm.layer_norm(x, weight[1:], weight)
    with pytest.raises(ValueError, match=r"residual is \(2, 24\).*must be \(3, 24\)"):
        dropout_add_layer_norm(x, x[1:], weight, weight)
    with pytest.raises(ValueError, match=r"x_bias is \(3, 24\)"):
        dropout_add_layer_norm(x, x, weight, weight, x_bias=x)
    with pytest.raises(ValueError, match="needs a seed"):
        dropout_add_layer_norm(x, x, weight, weight, p=0.1)
    with pytest.raises(ValueError, match="0 <= p <= 1"):
        dropout_add_layer_norm(x, x, weight, weight, p=1.1, seed=0)
    with pytest.raises(ValueError, match=r"x is torch\.int64; use float32"):
        layer_norm.layer_norm(x.long(), weight, weight)
    with pytest.raises(ValueError, match="scalar"):
        layer_norm.layer_norm(x[0, 0], weight, weight)
    with pytest.raises(ValueError, match="unknown"):
        layer_norm.layer_norm(x, weight, weight, impl="cuda")
    with pytest.raises(ValueError, match="tensor argument 1 is on meta"):
        layer_norm.layer_norm(x, weight.to("meta"), weight)


@needs_triton
def test_kernel_limits_are_named(device):
    x = torch.ones(1, 8, device=device)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        layer_norm.layer_norm(x.double(), x[0], x[0], impl="triton")


@needs_triton
def test_launch_cases_reach_every_width():
    with _dispatch.record_launches() as launches:
        for case in layer_norm_cases():
            case()
    for name in ("_layer_norm_forward_kernel", "_layer_norm_backward_kernel"):
        blocks = {launch.options["BLOCK"] for launch in launches if launch.kernel.__name__ == name}
        assert blocks >= {128, 256, 512, 1024, 2048, 4096}
    # Rows taken in blocks: one column, unaligned, long.
    means = [launch for launch in launches if launch.kernel.__name__ == "_gradient_means_kernel"]
    assert {launch.arguments[-3] for launch in means} == {1, 1023, 8192}
    in_blocks = [launch for launch in launches if not launch.options.get("IS_WHOLE", True)]
    assert {launch.arguments[-4] for launch in in_blocks} == {1, 1023, 8192}


@pytest.mark.gpu
@pytest.mark.parametrize("num_columns", [64, 256, 512, 768, 1023, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_every_width_is_as_exact_as_torch_at_real_sizes(num_columns, dtypes, device):
    inputs, dy = make_inputs((4099, num_columns), dtypes, device)
    for p in (0.0, 0.1):
        assert_exact("triton", inputs, dy, p)


@pytest.mark.gpu
@pytest.mark.parametrize("num_columns", [768, 1023, 8192])
def test_backward_repeats_a_hundred_times(num_columns, device):
    inputs, dy = make_inputs((8192, num_columns), DTYPES["bf16, fp32 parameters"], device)

    def run():
        return differentiate(lambda **t: dropout_add_layer_norm(**t, p=0.1, seed=5), inputs, dy)

    first = run()
    for _ in range(100):
        for name, tensor in run().items():
            assert torch.equal(first[name], tensor), name


@pytest.mark.gpu
def test_graph_replay_draws_new_masks(device):
    inputs, dy = make_inputs((64, 768), DTYPES["bf16, fp32 parameters"], device)
    seed = torch.tensor([1, 0], device=device)

    def run():
        return differentiate(lambda **t: dropout_add_layer_norm(**t, p=0.1, seed=seed), inputs, dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    previous = None
    for key in (2, 3):
        seed.copy_(torch.tensor([key, 0]))
        graph.replay()
        eager = run()
        assert_equal(captured, eager)
        assert previous is None or not torch.equal(previous, captured["y"])
        previous = captured["y"].clone()


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_two_to_the_31_elements(device):
    """The last rows lie past what a 32-bit offset reaches."""
    num_rows = 2**31 // 1024 + 64
    x = torch.randn(num_rows, 1024, device=device, dtype=torch.bfloat16).requires_grad_()
    residual = torch.randn_like(x).requires_grad_()
    weight, bias = torch.ones(1024, device=device), torch.zeros(1024, device=device)
    y = dropout_add_layer_norm(x, residual, weight, bias, p=0.1, seed=torch.tensor([3, 0], device=device))
    dx, dresidual = torch.autograd.grad(y, (x, residual), x.detach())
    tail = slice(num_rows - 128, None)
    x_tail, residual_tail = (t[tail].detach().requires_grad_() for t in (x, residual))
    seed = torch.tensor([3, num_rows - 128], device=device)
    y_tail = dropout_add_layer_norm(x_tail, residual_tail, weight, bias, p=0.1, seed=seed)
    expected = torch.autograd.grad(y_tail, (x_tail, residual_tail), x_tail.detach())
    assert torch.equal(y[tail], y_tail)
    assert torch.equal(dx[tail], expected[0]) and torch.equal(dresidual[tail], expected[1])


@both
@pytest.mark.parametrize("has_weight", [True, False])
def test_without_bias_or_weight(impl, has_weight, device):
    inputs, dy = make_inputs((5, 48), DTYPES["fp32"], device if impl == "triton" else "cpu")
    inputs = {name: inputs[name] for name in ("x", "residual", *["weight"] * has_weight)}

    def ours(x, residual, weight=None):
        y = dropout_add_layer_norm(x, residual, weight, None, impl=impl)
        return y + layer_norm.layer_norm(x, weight, None, impl=impl)

    def composed(x, residual, weight=None):
        return F.layer_norm(x + residual, (48,), weight) + F.layer_norm(x, (48,), weight)

    assert_gradients_as_exact_as_torch(ours, composed, inputs, dy)
