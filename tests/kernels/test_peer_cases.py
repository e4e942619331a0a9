"""What other libraries' tests try and ours did not: shapes, strides and values, held to our own measure of exactness.

Each test names whose case it is. Where a library's case is one of ours already (apex's LAMB options and one-element tensors,
Liger's and ml-cross-entropy's missing gradients, reductions and ignored rows), it is not repeated.
"""

import pytest
import torch
from accuracy import assert_gradients_as_exact_as_torch
from fastroberta_kernels import _dispatch, attention, layer_norm
from fastroberta_kernels.cross_entropy import linear_cross_entropy
from test_attention import assert_exact as assert_attention_exact
from test_attention import attend_by_definition, attend_sequences
from test_attention import differentiate as differentiate_attention
from test_attention import make_inputs as make_attention_inputs
from test_cross_entropy import check_against_torch
from test_layer_norm import assert_exact as assert_layer_norm_exact
from test_layer_norm import compose
from test_layer_norm import make_inputs as make_layer_norm_inputs

needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])


def place(impl, device):
    return device if impl == "triton" else "cpu"


def attend(impl, **options):
    return lambda q, k, v: attention.attention(q, k, v, impl=impl, **options)


@both
@pytest.mark.parametrize("head_dim", [40, 59, 111])
def test_odd_head_dims(impl, head_dim, device):
    """flash-attention, test_flash_attn_output."""
    inputs = make_attention_inputs(1, 13, 29, 2, head_dim, torch.float32, place(impl, device))
    assert_attention_exact(differentiate_attention(attend(impl), *inputs), attend_by_definition, inputs)


@both
@pytest.mark.parametrize("lengths", [(1, 239), (113, 203), (97, 97), (200, 200)], ids=str)
def test_lengths_beside_the_tiles(impl, lengths, device):
    """flash-attention, test_flash_attn_output and test_flash_attn_qkvpacked."""
    inputs = make_attention_inputs(1, *lengths, 1, 32, torch.float32, place(impl, device))
    assert_attention_exact(differentiate_attention(attend(impl), *inputs), attend_by_definition, inputs)


@pytest.mark.parametrize("lengths", [(1023, 1024), (1024, 1023), (3, 799), (127, 513)], ids=str)
def test_long_sequences_of_the_twin(lengths):
    """flash-attention, test_flash_attn_output."""
    inputs = make_attention_inputs(1, *lengths, 1, 32, torch.float32)
    assert_attention_exact(differentiate_attention(attend("torch"), *inputs), attend_by_definition, inputs)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sharp_scores_beside_the_tiles(impl, dtype, device):
    """flash-attention, test_flash_attn_bwd_overflow: keys beyond the last one, not masked, made dQ NaN."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 97, 2, 64, generator=generator) for _ in range(4))
    inputs = [tensor.to(place(impl, device), dtype) for tensor in (5 * q, 3 * k, 3 * v, grad)]
    assert_attention_exact(differentiate_attention(attend(impl), *inputs), attend_by_definition, inputs)


@both
@pytest.mark.parametrize("head_dim", [16, 64])
def test_one_key_a_document(impl, head_dim, device):
    """flash-attention, test_flash_attn_bwd_varlen_overflow."""
    generator = torch.Generator().manual_seed(0)
    lengths_q, lengths_k = [76, 34, 146], [1, 1, 1]
    q, grad = (3 * torch.randn(256, 2, head_dim, generator=generator) for _ in range(2))
    k, v = (3 * torch.randn(3, 2, head_dim, generator=generator) for _ in range(2))
    inputs = [tensor.to(place(impl, device), torch.float16) for tensor in (q, k, v, grad)]
    bounds = [
        torch.tensor([0, *lengths]).cumsum(0).to(inputs[0].device, torch.int32) for lengths in (lengths_q, lengths_k)
    ]

    def packed(q, k, v):
        return attention.varlen_attention(q, k, v, *bounds, 256, 3, impl=impl)

    ours = differentiate_attention(packed, *inputs)
    assert_attention_exact(ours, lambda q, k, v: attend_sequences(q, k, v, lengths_q, lengths_k), inputs)


@both
def test_a_transposed_output_with_a_strided_gradient(impl, device):
    """flash-attention, test_flash_attn_bwd_transpose: the strides of dO were mistaken for those of O."""
    q, k, v, _ = make_attention_inputs(3, 20, 20, 2, 32, torch.float32, place(impl, device))
    grad = torch.randn(20, 6, 2, 32, generator=torch.Generator().manual_seed(1)).to(q.device)[:, ::2]

    def transposed(function):
        return lambda q, k, v: function(q, k, v).transpose(0, 1)

    ours = differentiate_attention(transposed(attend(impl)), q, k, v, grad)
    assert_attention_exact(ours, transposed(attend_by_definition), [q, k, v, grad])


@both
@pytest.mark.parametrize("shape", [(1, 1, 1023), (3, 7, 256), (1, 1, 1500), (2, 3000)], ids=str)
def test_row_lengths(impl, shape, device):
    """Liger, test_liger_layer_norm; flash-attention, test_dropout_layer_norm_training (3,000 columns)."""
    inputs, dy = make_layer_norm_inputs(shape, (torch.float32,) * 3, place(impl, device))
    inputs = {name: inputs[name] for name in ("x", "weight", "bias")}
    assert_gradients_as_exact_as_torch(lambda **t: layer_norm.layer_norm(**t, impl=impl), compose(0.0), inputs, dy)


@both
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_16_bit_weights_and_much_dropout(impl, dtypes, device):
    """flash-attention, test_dropout_layer_norm_training: p = 0.37, the weights in half precision whatever the input's."""
    assert_layer_norm_exact(impl, *make_layer_norm_inputs((9, 192), dtypes, place(impl, device)), 0.37)


@both
def test_a_slice_of_a_larger_tensor(impl, device):
    """apex, test_layer_norm: every third row, fifth line and third column of a larger tensor."""
    inputs, dy = make_layer_norm_inputs((6, 4, 48), (torch.float32,) * 3, place(impl, device))
    wide = torch.full((18, 20, 144), float("nan"), device=dy.device)
    wide[::3, ::5, ::3] = inputs["x"].detach()
    inputs = {"x": wide[::3, ::5, ::3].requires_grad_(), "weight": inputs["weight"], "bias": inputs["bias"]}
    assert_gradients_as_exact_as_torch(lambda **t: layer_norm.layer_norm(**t, impl=impl), compose(0.0), inputs, dy)


@both
@pytest.mark.parametrize("num_rows, num_classes, width", [(63, 41, 41), (188, 123, 31), (63, 507, 123)])
def test_odd_sizes_of_the_head(impl, num_rows, num_classes, width, device):
    """Liger, test_correctness_functional; ml-cross-entropy, test_loss_backward: rows that classes are equal to, so that
    half of the distributions are sharp."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator) / width**0.5
    weight = torch.randn(num_classes, width, generator=generator)
    same = min(num_rows, num_classes) // 2
    weight[:same] = 20 * hidden[:same]
    targets = torch.randint(0, num_classes, (num_rows,), generator=generator)
    targets[:same] = torch.arange(same)
    targets[torch.randperm(num_rows, generator=generator)[: num_rows // 5]] = -100
    bias = 0.02 * torch.randn(num_classes, generator=generator)
    leaves = [leaf.to(place(impl, device)).requires_grad_() for leaf in (hidden, weight, bias)]
    check_against_torch(leaves, targets.to(leaves[0].device), impl)


@both
def test_more_classes_than_16_bits_count(impl, device):
    """flash-attention, test_cross_entropy_loss: 128,256 classes are read in more than one block."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 8), (128_256, 8), (128_256,))
    leaves = [torch.randn(size, generator=generator).to(place(impl, device)).requires_grad_() for size in sizes]
    targets = torch.tensor([128_255, 65_536, 7], device=leaves[0].device)
    check_against_torch(leaves, targets, impl)


@both
def test_weighted_tokens(impl, device):
    """Liger, test_correctness_token_scaling: the loss of each token by its own weight, as a detached probability is one."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((21, 16), (37, 16), (37,))
    leaves = [torch.randn(size, generator=generator).to(place(impl, device)).requires_grad_() for size in sizes]
    targets = torch.randint(0, 37, (21,), generator=generator).to(leaves[0].device)

    def weigh(losses):
        weights = torch.exp(-losses.detach())
        return (losses * weights).sum(), weights

    ours, _ = weigh(linear_cross_entropy(*leaves, targets, reduction="none", impl=impl).loss)
    logits = torch.nn.functional.linear(*leaves)
    theirs, _ = weigh(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves))
