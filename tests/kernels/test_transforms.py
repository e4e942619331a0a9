"""Every differentiable operation under PyTorch's own tools: gradcheck, autocast, dynamic shapes, torch.func."""

from __future__ import annotations

import pytest
import torch
from fastroberta_kernels import _dispatch
from fastroberta_kernels.attention import attention, varlen_attention
from fastroberta_kernels.cross_entropy import linear_cross_entropy
from fastroberta_kernels.embedding import embedding_layer_norm
from fastroberta_kernels.gelu import bias_gelu, geglu
from fastroberta_kernels.layer_norm import dropout_add_layer_norm, layer_norm
from fastroberta_kernels.rotary import apply_rotary

needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])

NUM_HEADS, HEAD_DIM, WIDTH, NUM_CLASSES = 2, 4, 5, 6


def attend(q, k, v, dropout_p=0.0, **options):
    key_lengths = (torch.arange(q.shape[0], device=q.device) + 2).int()
    return attention(q, k, v, key_lengths=key_lengths, dropout_p=dropout_p, seed=1, **options)


def attend_dropout(q, k, v, **options):
    return attend(q, k, v, 0.3, **options)


def attend_packed(q, k, v, **options):
    bounds = torch.tensor([0, 1, 1, 3], dtype=torch.int32, device=q.device)
    return varlen_attention(q, k, v, bounds, bounds, 2, 2, dropout_p=0.3, seed=1, **options)


def attend_window(q, k, v, **options):
    return attend(q, k, v, 0.3, window_size=(1, 0), **options)


def rotate(q, k, **options):
    cos, sin = (torch.ones(q.shape[1], HEAD_DIM // 2, device=q.device, dtype=q.dtype) * value for value in (0.8, 0.6))
    q, k = apply_rotary(q, k, cos, sin, **options)
    return q + 2 * k


def normalize(x, residual, weight, bias, x_bias, **options):
    return dropout_add_layer_norm(x, residual, weight, bias, p=0.3, seed=1, x_bias=x_bias, **options)


def embed(words, positions, types, weight, bias, **options):
    ids = torch.tensor([[0, 4, 2], [0, 3, 3]], device=words.device)
    return embedding_layer_norm(ids, words, positions, types, weight, bias, p=0.3, seed=1, **options)


def compute_loss(hidden, weight, bias, reduction="mean", **options):
    targets = torch.arange(hidden.shape[0], device=hidden.device) % (NUM_CLASSES - 1)
    targets = torch.where(targets % 3 == 1, -100, targets)
    options |= {"label_smoothing": 0.1, "z_loss": 0.1, "num_classes": NUM_CLASSES - 1, "reduction": reduction}
    return linear_cross_entropy(hidden, weight, bias, targets, **options).loss


def compute_losses(*tensors, **options):
    return compute_loss(*tensors, reduction="none", **options)


# An operation, and the shapes of its differentiable inputs; B is the batch, L its length.
B, L = "B", "L"
OPERATIONS = {
    "attention": (attend, [(B, L, NUM_HEADS, HEAD_DIM)] * 3),
    "attention with dropout": (attend_dropout, [(B, L, NUM_HEADS, HEAD_DIM)] * 3),
    "attention in a window": (attend_window, [(B, L, NUM_HEADS, HEAD_DIM)] * 3),
    "varlen_attention": (attend_packed, [(L, NUM_HEADS, HEAD_DIM)] * 3),
    "layer_norm": (layer_norm, [(B, L, WIDTH), (WIDTH,), (WIDTH,)]),
    "dropout_add_layer_norm": (normalize, [(B, L, WIDTH)] * 2 + [(WIDTH,)] * 3),
    "bias_gelu": (bias_gelu, [(B, L, WIDTH), (WIDTH,)]),
    "geglu": (geglu, [(B, L, 2 * WIDTH), (2 * WIDTH,)]),
    "apply_rotary": (rotate, [(B, L, NUM_HEADS, HEAD_DIM)] * 2),
    "embedding_layer_norm": (embed, [(7, WIDTH), (9, WIDTH), (2, WIDTH), (WIDTH,), (WIDTH,)]),
    "linear_cross_entropy": (compute_loss, [(L, WIDTH), (NUM_CLASSES, WIDTH), (NUM_CLASSES,)]),
    "losses of rows": (compute_losses, [(L, WIDTH), (NUM_CLASSES, WIDTH), (NUM_CLASSES,)]),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def make_inputs(name, dtype=torch.float32, device="cpu", batch=2, length=3):
    function, shapes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    sizes = [[{B: batch, L: length}.get(size, size) for size in shape] for shape in shapes]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return function, [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


@every_operation
def test_twins_compute_in_fp64_and_pass_gradcheck(name):
    function, inputs = make_inputs(name, torch.float64)
    assert function(*inputs).dtype == torch.float64
    torch.autograd.gradcheck(function, inputs)


class Unused(torch.autograd.Function):
    """The first tensor, and no gradient for the second."""

    @staticmethod
    def forward(ctx, kept, unused):
        return kept.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@both
@every_operation
def test_an_undefined_gradient_is_passed_on(impl, name, device):
    function, inputs = make_inputs(name, device=device if impl == "triton" else "cpu")
    kept = torch.ones((), device=inputs[0].device, requires_grad=True)
    Unused.apply(kept, function(*inputs, impl=impl)).backward()
    assert kept.grad == 1
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in inputs)


FOLLOWS_AUTOCAST = ("attention", "attention with dropout", "attention in a window", "varlen_attention")


@both
@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_rule_for_autocast(impl, name, dtype, device):
    """Attention runs in autocast's dtype; others keep that of their input. The backward may run inside or outside."""
    function, inputs = make_inputs(name, dtype, device if impl == "triton" else "cpu")
    device_type = inputs[0].device.type
    if name.startswith("l") and "layer_norm" not in name:
        expected = torch.float32
    else:
        expected = torch.bfloat16 if name in FOLLOWS_AUTOCAST else dtype
    with torch.autocast(device_type, torch.bfloat16):
        out = function(*inputs, impl=impl)
        assert out.dtype == expected
        inside = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    outside = torch.autograd.grad(out.sum(), inputs)
    for tensor, one, other in zip(inputs, inside, outside):
        assert one.dtype == tensor.dtype and torch.equal(one, other)


@both
@pytest.mark.parametrize("name", ["attention", "attention with dropout", "linear_cross_entropy", "losses of rows"])
def test_a_backward_inside_autocast_changes_nothing(impl, name, device):
    """Of a forward that ran outside it."""
    function, inputs = make_inputs(name, device=device if impl == "triton" else "cpu")
    out = function(*inputs, impl=impl)
    expected = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        got = torch.autograd.grad(out.sum(), inputs)
    for one, other in zip(got, expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "impl", ["torch", pytest.param("triton", marks=[needs_triton, pytest.mark.slow(reason="25 seconds in all")])]
)
@every_operation
def test_dynamic_shapes_are_compiled_once(impl, name, device):
    """One graph for every batch and length, with the results of eager execution."""
    function, _ = OPERATIONS[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 3), (4, 5), (3, 7)):
        _, inputs = make_inputs(name, device=device if impl == "triton" else "cpu", batch=batch, length=length)
        out, expected = compiled(*inputs, impl=impl), function(*inputs, impl=impl)
        torch.testing.assert_close(out, expected)
        gradients, others = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))
        torch.testing.assert_close(gradients, others)


@both
@every_operation
def test_dynamic_shapes_are_exported(impl, name, device):
    function, inputs = make_inputs(name, device=device if impl == "triton" else "cpu")

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors, impl=impl)

    # A launch has at most 65,535 blocks along the batch; export wants that said.
    names = {B: torch.export.Dim("batch", max=65_532), L: torch.export.Dim("length")}
    shapes = [{i: names[size] for i, size in enumerate(shape) if size in names} for shape in OPERATIONS[name][1]]
    inputs = [tensor.detach() for tensor in inputs]
    exported = torch.export.export(Module(), tuple(inputs), dynamic_shapes=(tuple(shapes),)).module()
    _, others = make_inputs(name, device=inputs[0].device, batch=4, length=5)
    torch.testing.assert_close(exported(*others), function(*others, impl=impl))


@pytest.mark.parametrize(
    "name", ["attention", "layer_norm", "dropout_add_layer_norm", "bias_gelu", "geglu", "apply_rotary"]
)
def test_per_sample_gradients_of_twins(name):
    """Those that are made of PyTorch's own operations, which torch.func can see through."""
    function, inputs = make_inputs(name)
    inputs = [tensor.detach() for tensor in inputs]

    def loss(sample, *others):
        return function(sample[None], *(other[None] if other.dim() > 1 else other for other in others)).square().sum()

    dims = [0 if tensor.dim() > 2 else None for tensor in inputs]
    got = torch.func.vmap(torch.func.grad(loss), in_dims=tuple(dims))(*inputs)
    for index in range(inputs[0].shape[0]):
        sample = [tensor[index] if dim == 0 else tensor for tensor, dim in zip(inputs, dims)]
        torch.testing.assert_close(got[index], torch.func.grad(loss)(*sample))


def test_per_sample_gradients_of_embeddings_and_loss():
    """From ids to the loss; the loop over samples runs outside torch.func."""
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(1, 7, (2, 3, 4), generator=generator).unbind()
    targets = torch.where(targets < 3, -100, targets - 2)
    _, tables = make_inputs("embedding_layer_norm")
    weights = [torch.randn(NUM_CLASSES, WIDTH, generator=generator), torch.randn(NUM_CLASSES, generator=generator)]
    parameters = [tensor.detach() for tensor in (*tables, *weights)]

    def loss(parameters, ids, targets):
        *tables, weight, bias = parameters
        hidden = embedding_layer_norm(ids[None], *tables, padding_idx=1)
        options = {"label_smoothing": 0.1, "z_loss": 0.1, "num_classes": NUM_CLASSES - 1}
        return linear_cross_entropy(hidden[0], weight, bias, targets, **options).loss

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, ids, targets)
    for index in range(len(ids)):
        leaves = [tensor.clone().requires_grad_() for tensor in parameters]
        expected = torch.autograd.grad(loss(leaves, ids[index], targets[index]), leaves)
        for one, other in zip(got, expected):
            torch.testing.assert_close(one[index], other)


@needs_triton
@every_operation
def test_torch_func_on_a_kernel_is_refused_by_name(name, device):
    function, inputs = make_inputs(name, device=device)
    with pytest.raises(ValueError, match=r": torch.func cannot transform the Triton kernel; pass impl='torch'"):
        torch.func.grad(lambda *tensors: function(*tensors, impl="triton").sum())(*inputs)


@pytest.mark.parametrize("name", ["attention with dropout", "varlen_attention"])
def test_torch_func_on_some_twins_is_refused_with_a_way_out(name):
    function, inputs = make_inputs(name)
    with pytest.raises(ValueError, match=r"attention: torch.func cannot transform this call; use .* inside"):
        torch.func.grad(lambda *tensors: function(*tensors).sum())(*inputs)
