"""Attention, dense and packed: exactness, dropout decisions, ignored keys, empty documents, every way to call it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as_torch, assert_equal
from fastroberta_kernels import _attention_cpu, _attention_window_cpu, _dispatch, attention, philox
from torch.utils.checkpoint import checkpoint

needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])


def make_inputs(batch, length_q, length_k, num_heads, head_dim, dtype, device="cpu"):
    """Queries, keys, values, output gradient as a network has them: biased, with outlier channels."""
    generator = torch.Generator().manual_seed(length_q * 1000 + length_k)

    def normal(length):
        return torch.randn((batch, length, num_heads, head_dim), generator=generator)

    q, k, v, grad = normal(length_q), normal(length_k), normal(length_k) + 1, normal(length_q)
    q[..., head_dim // 2] *= 5
    k[..., head_dim // 2] += 2
    v[..., 0] *= 30
    return [tensor.to(device, dtype) for tensor in (q, k, v, grad)]


class Flash(torch.autograd.Function):
    """Attention with the backward that every fused kernel uses: the correction of the softmax comes from dO * O.

    Its rounding errors do not cancel as those of an explicit softmax do: with outlier channels PyTorch's own fused
    operation is several times less exact than its explicit one. This is the measure where that has no dropout.
    """

    @staticmethod
    def forward(ctx, q, k, v, kept, bias):
        probabilities = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias, -1)
        out = torch.einsum("bhqk,bkhd->bqhd", probabilities * kept, v)
        ctx.save_for_backward(q, k, v, kept, probabilities, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, kept, probabilities, out = ctx.saved_tensors
        delta = (grad * out).sum(-1).transpose(1, 2)[..., None]
        dscores = probabilities * (torch.einsum("bqhd,bkhd->bhqk", grad, v) * kept - delta) * q.shape[-1] ** -0.5
        dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k)
        dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q)
        return dq, dk, torch.einsum("bhqk,bqhd->bkhd", probabilities * kept, grad), None, None


NO_WINDOW = (-1, -1)


def attend_by_definition(q, k, v, dropout_p=0.0, seed=0, first_row=0, window=NO_WINDOW):
    """One sequence or a dense batch, (batch, length, heads, dim): exact in fp64, else as PyTorch's fused operation does."""
    if dropout_p == 0 and q.dtype != torch.float64 and window == NO_WINDOW:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    kept = q.new_ones(())
    if dropout_p > 0:
        batch, num_q, num_heads = q.shape[:3]
        seed = torch.tensor([seed, first_row])
        keep = philox.dropout_keep_torch(seed, dropout_p, batch * num_q, k.shape[1], num_heads)
        kept = keep.view(batch, num_q, num_heads, -1).transpose(1, 2).to(q.dtype) * philox.dropout_scale(dropout_p)
    left, right = (k.shape[1] + q.shape[1] if side < 0 else side for side in window)
    distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
    is_hidden = (distance < -left) | (distance > right)
    bias = torch.zeros(is_hidden.shape, dtype=q.dtype).masked_fill(is_hidden, float("-inf"))
    if num_blind := max(0, q.shape[1] - k.shape[1] - left):  # the last queries, which see no key
        q, bias = q[:, :-num_blind], bias[:-num_blind]
        kept = kept[..., :-num_blind, :] if kept.dim() else kept
    if q.dtype != torch.float64:
        out = Flash.apply(q, k, v, kept, bias)
    else:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias
        out = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1) * kept, v)
    return F.pad(out, (0, 0, 0, 0, 0, num_blind))


def attend_sequences(q, k, v, lengths_q, lengths_k, dropout_p=0.0, seed=0, window=NO_WINDOW):
    """Packed (tokens, heads, dim): each document alone."""
    outputs, first_q, first_k = [], 0, 0
    for num_q, num_k in zip(lengths_q, lengths_k):
        part_q = q[None, first_q : first_q + num_q]
        part_k, part_v = k[None, first_k : first_k + num_k], v[None, first_k : first_k + num_k]
        if num_q and num_k:
            outputs.append(attend_by_definition(part_q, part_k, part_v, dropout_p, seed, first_q, window)[0])
        else:
            outputs.append(part_q[0] * 0)
        first_q, first_k = first_q + num_q, first_k + num_k
    return torch.cat([*outputs, q[first_q:] * 0])


def differentiate(function, q, k, v, grad):
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = function(*inputs)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *torch.autograd.grad(out, inputs, grad))))


def to_double(tensors):
    return [tensor.cpu().double() for tensor in tensors]


def assert_exact(ours, definition, inputs):
    """Hold results by name to those of a function from PyTorch's own operations."""
    theirs = differentiate(definition, *(tensor.cpu() for tensor in inputs))
    exact = differentiate(definition, *to_double(inputs))
    for name in ours:
        assert_as_exact_as_torch(ours[name], theirs[name], exact[name], name)


# One query and hardly a key; primes that fill no block; more keys than one block of the kernel, with queries of the last
# layer's kind (few); more queries than keys.
SHAPES = [(1, 1, 3, 1, 32), (2, 37, 37, 2, 64), (1, 13, 149, 2, 64), (1, 131, 17, 1, 128), (4, 37, 41, 2, 32)]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_as_exact_as_torch(impl, dtype, shape, device):
    inputs = make_inputs(*shape, dtype, device if impl == "triton" else "cpu")

    ours = differentiate(lambda q, k, v: attention.attention(q, k, v, impl=impl), *inputs)
    assert_exact(ours, attend_by_definition, inputs)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_attention_dropout_is_as_exact_as_torch(impl, dtype, shape, device):
    inputs = make_inputs(*shape, dtype, device if impl == "triton" else "cpu")
    seed = torch.tensor([7, 1 << 33], device=inputs[0].device)

    def by_definition(q, k, v):
        return attend_by_definition(q, k, v, 0.3, 7, 1 << 33)

    ours = differentiate(lambda q, k, v: attention.attention(q, k, v, dropout_p=0.3, seed=seed, impl=impl), *inputs)
    assert_exact(ours, by_definition, inputs)


@both
def test_attention_dropout_keeps_what_philox_keeps(impl, device):
    """With equal scores and unit values the output shows the mask itself; more columns and rows than one block."""
    device = device if impl == "triton" else torch.device("cpu")
    q = torch.zeros(1, 21, 2, 160, device=device)[..., :128]
    k = torch.zeros(1, 128, 2, 128, device=device)
    v = torch.eye(128, device=device)[None, :, None].expand(1, 128, 2, 128)
    out = attention.attention(q, k, v, dropout_p=0.4, seed=5, impl=impl)
    keep = philox.dropout_keep_torch(philox.as_seed(5, out.device), 0.4, 21, 128, 2)
    torch.testing.assert_close(out[0], keep * (philox.dropout_scale(0.4) / 128), rtol=1e-5, atol=0)


@both
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_attention_ignores_keys_past_their_length(impl, dropout_p, device):
    """Lengths 0, partial (within the first block), whole blocks ignored, all."""
    lengths = [0, 33, 5, 140]
    q, k, v, grad = make_inputs(4, 18, 140, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    key_lengths = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    ours = differentiate(
        lambda q, k, v: attention.attention(
            q, k, v, dropout_p=dropout_p, seed=3, key_lengths=key_lengths, impl=impl
        ),
        q, k, v, grad,
    )  # fmt: skip

    def by_definition(q, k, v):
        outputs = [
            attend_by_definition(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], dropout_p, 3, 18 * b)
            if n else q[b : b + 1] * 0
            for b, n in enumerate(lengths)
        ]  # fmt: skip
        return torch.cat(outputs)

    assert_exact(ours, by_definition, (q, k, v, grad))
    for name, part in (("out", 0), ("dq", 0), ("dk", 0), ("dv", 0), ("dk", (1, slice(33, None)))):
        assert not ours[name][part].any(), name


@both
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_what_is_ignored_may_hold_nan(impl, dropout_p, device):
    """Keys past their length, and the queries of a sequence without keys."""
    q, k, v, grad = make_inputs(3, 5, 20, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    key_lengths = torch.tensor([0, 7, 20], dtype=torch.int32, device=q.device)

    def attend(q, k, v):
        return attention.attention(q, k, v, dropout_p=dropout_p, seed=3, key_lengths=key_lengths, impl=impl)

    expected = differentiate(attend, q, k, v, grad)
    q[0] = float("nan")
    for tensor in (k, v):
        tensor[0] = tensor[1, 7:] = float("nan")
    assert_equal(differentiate(attend, q, k, v, grad), expected)


# An empty document at the start, in the middle, without keys only, without queries only; trailing ones as padding.
LENGTHS_Q = [0, 19, 7, 0, 37, 5, 0]
LENGTHS_K = [0, 19, 0, 11, 37, 140, 0]


def make_packed(dtype, device, head_dim=32, spare=3):
    """Queries and keys of the documents, with `spare` rows after them that belong to none."""
    num_q, num_k = sum(LENGTHS_Q) + spare, sum(LENGTHS_K) + spare
    q, k, v, grad = (t[0] for t in make_inputs(1, num_q, num_k, 2, head_dim, dtype, device))
    bounds = [F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device) for lengths in (LENGTHS_Q, LENGTHS_K)]
    return (q, k, v, grad), (*bounds, max(LENGTHS_Q), max(LENGTHS_K))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_varlen_attention_is_as_exact_as_torch(impl, dtype, dropout_p, device):
    inputs, lengths = make_packed(dtype, device if impl == "triton" else torch.device("cpu"))

    def by_definition(q, k, v):
        return attend_sequences(q, k, v, LENGTHS_Q, LENGTHS_K, dropout_p, 9)

    ours = differentiate(
        lambda q, k, v: attention.varlen_attention(q, k, v, *lengths, dropout_p=dropout_p, seed=9, impl=impl), *inputs
    )
    assert_exact(ours, by_definition, inputs)


# ---- sliding windows -------------------------------------------------------------------------------------------------

# Lopsided; only itself; causal; without a bound to the right; wider than the sequence.
WINDOWS = [(9, 3), (0, 0), (-1, 0), (40, -1), (500, 500)]


@both
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype, dropout_p", [(torch.float32, 0.0), (torch.bfloat16, 0.3)], ids=str)
def test_window_is_as_exact_as_torch(impl, dtype, dropout_p, window, device):
    """Several blocks of queries and keys, of which some see nothing of each other."""
    inputs = make_inputs(1, 150, 150, 1, 32, dtype, device if impl == "triton" else "cpu")

    def by_definition(q, k, v):
        return attend_by_definition(q, k, v, dropout_p, 7, 0, window)

    ours = differentiate(
        lambda q, k, v: attention.attention(q, k, v, dropout_p=dropout_p, seed=7, window_size=window, impl=impl),
        *inputs,
    )
    if window == (0, 0):  # one key has all the weight: gradients of queries and keys are rounding of zero
        for name in ("dq", "dk"):
            assert ours.pop(name).abs().max() < 0.1 * ours["dv"].abs().max()
    assert_exact(ours, by_definition, inputs)


@both
@pytest.mark.parametrize("dropout_p", [pytest.param(0.0, marks=pytest.mark.slow(reason="3 seconds")), 0.3])
def test_window_ends_with_the_keys(impl, dropout_p, device):
    """Lengths 0, partial, all. Queries that see no key give zeros; they and ignored keys may hold NaN."""
    lengths, window = [0, 33, 5, 70], (9, 3)
    inputs = make_inputs(4, 70, 70, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    q, k, v, _ = inputs
    key_lengths = torch.tensor(lengths, dtype=torch.int32, device=q.device)

    def attend(q, k, v):
        return attention.attention(
            q, k, v, dropout_p=dropout_p, seed=3, key_lengths=key_lengths, window_size=window, impl=impl
        )

    def by_definition(q, k, v):
        outputs = [
            attend_by_definition(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], dropout_p, 3, 70 * b, window)
            if n else q[b : b + 1] * 0
            for b, n in enumerate(lengths)
        ]  # fmt: skip
        return torch.cat(outputs)

    expected = differentiate(attend, *inputs)
    assert_exact(expected, by_definition, inputs)
    for b, length in enumerate(lengths):
        blind = slice(length + window[0] if length else 0, None)
        assert not any(expected[name][b, blind].any() for name in ("out", "dq"))
        q[b, blind] = k[b, length:] = v[b, length:] = float("nan")
    assert_equal(differentiate(attend, *inputs), expected)


@both
@pytest.mark.parametrize("dropout_p", [pytest.param(0.0, marks=pytest.mark.slow(reason="3 seconds")), 0.3])
def test_window_inside_documents(impl, dropout_p, device):
    inputs, lengths = make_packed(torch.float32, device if impl == "triton" else torch.device("cpu"))

    def by_definition(q, k, v):
        return attend_sequences(q, k, v, LENGTHS_Q, LENGTHS_K, dropout_p, 9, (4, 6))

    def attend(q, k, v):
        return attention.varlen_attention(q, k, v, *lengths, dropout_p=dropout_p, seed=9, window_size=(4, 6), impl=impl)

    assert_exact(differentiate(attend, *inputs), by_definition, inputs)


@both
def test_blocks_outside_the_window_are_not_read(impl, device):
    """NaN at the end reaches only the blocks next to it. Blocks have at most 64 queries or keys here."""
    inputs = make_inputs(1, 256, 256, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    for tensor in inputs:
        tensor[:, 250:] = float("nan")
    results = differentiate(lambda q, k, v: attention.attention(q, k, v, window_size=(5, 5), impl=impl), *inputs)
    for name, result in results.items():
        assert result[:, :128].isfinite().all() and result[:, 250:].isnan().any(), name


WRONG_BOUNDS = [[-3, 4, 9], [0, 4, 12], [0, 30, 9], [5, 20, 40]]


@pytest.mark.parametrize("bounds", WRONG_BOUNDS, ids=str)
@pytest.mark.parametrize("side", ["q", "k"])
def test_wrong_bounds_are_named_by_the_twin(bounds, side):
    tokens = torch.zeros(9, 1, 32)
    right, wrong = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor(bounds, dtype=torch.int32)
    sides = (wrong, right) if side == "q" else (right, wrong)
    with pytest.raises(ValueError, match=f"cu_seqlens_{side} must ascend from 0 to at most 9"):
        attention.varlen_attention(tokens, tokens, tokens, *sides, 40, 40, impl="torch")


@needs_triton
@pytest.mark.parametrize("bounds", WRONG_BOUNDS, ids=str)
@pytest.mark.parametrize("side", ["q", "k"])
def test_wrong_bounds_write_nothing_outside(bounds, side, device):
    """The gradients lie in the middle of larger tensors, whose ends must keep what they held."""
    tokens = torch.randn(9, 1, 32, device=device)
    right = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    wrong = torch.tensor(bounds, dtype=torch.int32, device=device)
    sides = (wrong, right) if side == "q" else (right, wrong)
    out, lse = attention.attention_forward(tokens, tokens, tokens, *sides, None, 40, 40, 0.0, 1.0)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    held = [torch.full((69, 1, 32), 7.0, device=device) for _ in range(3)]
    gradients = [tensor[30:39] for tensor in held]
    attention.launch_backward(tokens, tokens, tokens, tokens, out, lse, *gradients, *sides, None, 40, 40, 0.0, 1.0)
    for tensor in held:
        assert tensor[:30].eq(7).all() and tensor[39:].eq(7).all()


@both
def test_one_document_equals_dense(impl, device):
    inputs = make_inputs(1, 37, 53, 2, 32, torch.float32, device if impl == "triton" else "cpu")
    bounds = [torch.tensor([0, length], dtype=torch.int32, device=inputs[0].device) for length in (37, 53)]
    dense = differentiate(lambda q, k, v: attention.attention(q, k, v, dropout_p=0.1, seed=1, impl=impl), *inputs)
    packed = differentiate(
        lambda q, k, v: attention.varlen_attention(q, k, v, *bounds, 37, 53, dropout_p=0.1, seed=1, impl=impl),
        *(tensor[0] for tensor in inputs),
    )
    for name in dense:
        assert torch.equal(dense[name][0], packed[name]), name


@needs_triton
@pytest.mark.parametrize("blocks", [(16, 16, 4, 1), (32, 64, 4, 1)], ids=str)
@pytest.mark.parametrize("window", [NO_WINDOW, (9, 5)], ids=str)
def test_dropout_and_result_do_not_depend_on_block_sizes(blocks, window, device, monkeypatch):
    inputs = make_inputs(1, 19, 40, 1, 32, torch.float32, device)

    def run():
        return differentiate(
            lambda q, k, v: attention.attention(q, k, v, dropout_p=0.3, seed=1, window_size=window, impl="triton"),
            *inputs,
        )

    before = run()
    monkeypatch.setitem(attention.FORWARD_BLOCKS, (4, 32), blocks)
    monkeypatch.setitem(attention.BACKWARD_BLOCKS, (4, 32), blocks)
    after = run()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize(
    "capability, forward, backward",
    [(80, (128, 64), (16, 128)), (86, (128, 64), (16, 128)), (90, (128, 128), (64, 128)), (120, (128, 64), (16, 128))],
)
def test_tiles_are_chosen_by_chip(capability, forward, backward):
    q, k, v, _ = (tensor.requires_grad_() for tensor in make_inputs(1, 16, 16, 1, 64, torch.bfloat16))
    with _dispatch.record_launches(capability) as launches:
        out = attention.attention(q, k, v, impl="triton")
        out.backward(torch.zeros_like(out))
    tiles = [(launch.options["BLOCK_M"], launch.options["BLOCK_N"]) for launch in launches]
    assert tiles == [forward, backward]


@needs_triton
@pytest.mark.parametrize("max_chunks", [1, 2, 3])
@pytest.mark.parametrize("window", [NO_WINDOW, (9, 5)], ids=str)
def test_backward_does_not_depend_on_how_keys_are_divided(max_chunks, window, device, monkeypatch):
    """One program a head writes dq itself; several leave parts to be summed, also where some chunks have no keys."""
    monkeypatch.setitem(attention.BACKWARD_BLOCKS, (4, 32), (16, 16, 4, 1))
    monkeypatch.setattr(attention, "MAX_CHUNKS", max_chunks)
    inputs = make_inputs(2, 21, 70, 1, 32, torch.float32, device)
    key_lengths = torch.tensor([70, 20], dtype=torch.int32, device=device)

    def attend(impl):
        return lambda q, k, v: attention.attention(
            q, k, v, key_lengths=key_lengths.to(q.device), window_size=window, impl=impl
        )

    ours = differentiate(attend("triton"), *inputs)
    theirs = differentiate(attend("torch"), *(tensor.cpu() for tensor in inputs))
    for name in ours:
        torch.testing.assert_close(ours[name].cpu(), theirs[name], rtol=1e-4, atol=1e-3)


@needs_triton
@pytest.mark.parametrize("max_chunks", [1, 2])
@pytest.mark.parametrize("dtype, dropout_p", [(torch.float16, 0.0), (torch.bfloat16, 0.3)], ids=str)
def test_full_blocks_need_no_masks(max_chunks, dtype, dropout_p, device, monkeypatch):
    """Bit for bit what kernels with masks give, which `key_lengths` asks for, and as exact as PyTorch."""
    for blocks in (attention.FORWARD_BLOCKS, attention.BACKWARD_BLOCKS):
        monkeypatch.setitem(blocks, (dtype.itemsize, 32), (16, 32, 4, 1))
    monkeypatch.setattr(attention, "MAX_CHUNKS", max_chunks)
    inputs = make_inputs(2, 48, 64, 2, 32, dtype, device)
    key_lengths = torch.full((2,), 64, dtype=torch.int32, device=device)

    def attend(**options):
        return lambda q, k, v: attention.attention(q, k, v, dropout_p=dropout_p, seed=3, impl="triton", **options)

    ours, masked = (differentiate(attend(**options), *inputs) for options in ({}, {"key_lengths": key_lengths}))
    for name in ours:
        assert torch.equal(ours[name], masked[name]), name
    assert_exact(ours, lambda q, k, v: attend_by_definition(q, k, v, dropout_p, 3), inputs)


@needs_triton
@pytest.mark.parametrize(
    "length_q, length_k, options, is_even",
    [
        (256, 512, {}, [True, True]),
        (16, 512, {}, [False, True]),  # the backward's tiles are 16 x 128, the forward's 128 x 64
        (256, 64, {}, [True, False]),
        (256, 509, {}, [False, False]),
        (256, 0, {}, [False, False]),
        (256, 512, {"key_lengths": torch.tensor([512], dtype=torch.int32)}, [False, False]),
        (256, 512, {"window_size": (64, 64)}, [False, False]),
    ],
)
def test_masks_are_left_out_where_blocks_are_full(length_q, length_k, options, is_even):
    q, k, v, _ = (tensor.requires_grad_() for tensor in make_inputs(1, length_q, length_k, 1, 64, torch.bfloat16))
    with _dispatch.record_launches() as launches:
        out = attention.attention(q, k, v, impl="triton", **options)
        out.backward(torch.zeros_like(out))
    assert [launch.options["EVEN"] for launch in launches] == is_even


@both
@pytest.mark.parametrize("head_dim", [1, 24, 48, 100])
def test_other_head_dims_are_padded(impl, head_dim, device):
    inputs = make_inputs(4, 13, 19, 2, head_dim, torch.float32, device if impl == "triton" else "cpu")
    ours = differentiate(lambda q, k, v: attention.attention(q, k, v, impl=impl), *inputs)
    assert_exact(ours, attend_by_definition, inputs)


@both
@pytest.mark.parametrize("layout", ["fused projection", "heads first", "last dimension strided", "unaligned"])
def test_layouts(impl, layout, device):
    device = device if impl == "triton" else torch.device("cpu")
    batch, length, num_heads, head_dim = 2, 19, 2, 32
    tensors = make_inputs(batch, length, length, num_heads, head_dim, torch.float32, device)
    *plain, grad = tensors
    if layout == "fused projection":
        views = torch.stack(plain, 2).unbind(2)
    elif layout == "heads first":
        views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in plain]
    elif layout == "last dimension strided":
        views = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in plain]
    else:
        views = [F.pad(tensor.reshape(-1), (1, 0))[1:].view(tensor.shape) for tensor in plain]
    expected = differentiate(lambda q, k, v: attention.attention(q, k, v, impl=impl), *plain, grad)
    got = differentiate(lambda q, k, v: attention.attention(q, k, v, impl=impl), *views, grad)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


@both
def test_expanded_gradient(impl, device):
    """The gradient of a sum has strides of zero."""
    q, k, v, _ = make_inputs(1, 5, 7, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    ones = torch.ones_like(q)
    expected = differentiate(lambda q, k, v: attention.attention(q, k, v, impl=impl), q, k, v, ones)
    got = differentiate(
        lambda q, k, v: attention.attention(q, k, v, impl=impl), q, k, v, torch.ones((), device=q.device).expand_as(q)
    )
    assert_equal(got, expected)


@both
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_empty_tensors(impl, shape, device):
    batch, length_q, length_k = shape
    q, k, v, grad = make_inputs(batch, length_q, length_k, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    for dropout_p in (0.0, 0.1):
        results = differentiate(
            lambda q, k, v, p=dropout_p: attention.attention(q, k, v, dropout_p=p, seed=0, impl=impl), q, k, v, grad
        )
        for name, tensor in zip(("out", "dq", "dk", "dv"), (q, q, k, v)):
            assert results[name].shape == tensor.shape and not results[name].any(), name


@both
def test_dropout_of_everything_gives_zeros(impl, device):
    inputs = make_inputs(1, 5, 7, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    results = differentiate(lambda q, k, v: attention.attention(q, k, v, dropout_p=1.0, seed=0, impl=impl), *inputs)
    assert not any(result.any() for result in results.values())


@both
def test_large_scores_do_not_overflow(impl, device):
    """Scores of thousands: one key takes all, where gradients of queries and keys are rounding of zero."""
    q, k, v, grad = make_inputs(1, 9, 20, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    inputs = (q * 100, k * 100, v, grad)
    ours = differentiate(lambda q, k, v: attention.attention(q, k, v, impl=impl), *inputs)
    exact = differentiate(attend_by_definition, *to_double(inputs))
    for name in ("out", "dv"):
        assert (ours[name].cpu() - exact[name]).abs().max() < 0.01 * exact[name].abs().max(), name
    for name in ("dq", "dk"):
        assert torch.isfinite(ours[name]).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_key(impl, dtype, device):
    """Its probability is one whatever the score: the gradients of query and key are rounding of zero."""
    q, k, v, grad = make_inputs(2, 3, 1, 1, 32, dtype, device if impl == "triton" else "cpu")
    got = differentiate(lambda q, k, v: attention.attention(q, k, v, impl=impl), q, k, v, grad)
    assert torch.equal(got["out"], v.expand_as(q))
    torch.testing.assert_close(got["dv"], grad.float().sum(1, keepdim=True).to(dtype))
    for name in ("dq", "dk"):
        assert got[name].abs().max() < 1e-5 * (grad.float().norm() * v.float().norm())


@both
def test_scale(impl, device):
    inputs = make_inputs(1, 13, 19, 1, 32, torch.float32, device if impl == "triton" else "cpu")
    factor = 0.5 * 32**0.5

    def by_definition(q, k, v):
        return attend_by_definition(q * factor, k, v)

    ours = differentiate(lambda q, k, v: attention.attention(q, k, v, scale=0.5, impl=impl), *inputs)
    exact = differentiate(by_definition, *to_double(inputs))
    for name in exact:
        assert (ours[name].cpu() - exact[name]).abs().max() < 1e-5 * exact[name].abs().max(), name


@both
def test_repeats_are_bitwise_equal(impl, device):
    inputs = make_inputs(2, 37, 150, 1, 64, torch.bfloat16, device if impl == "triton" else "cpu")

    def run():
        return differentiate(lambda q, k, v: attention.attention(q, k, v, dropout_p=0.1, seed=4, impl=impl), *inputs)

    assert_equal(run(), run())


@both
def test_checkpoint_recomputes_the_same_dropout(impl, device):
    inputs = make_inputs(1, 9, 20, 1, 32, torch.float32, device if impl == "triton" else "cpu")

    def attend(q, k, v):
        return attention.attention(q, k, v, dropout_p=0.5, seed=4, impl=impl)

    plain = differentiate(attend, *inputs)
    recomputed = differentiate(lambda *args: checkpoint(attend, *args, use_reentrant=False), *inputs)
    assert_equal(plain, recomputed)


@both
def test_compiled_equals_eager(impl, device):
    device = device if impl == "triton" else torch.device("cpu")
    dropout_p = 0.2
    inputs = make_inputs(2, 5, 20, 1, 32, torch.float32, device)
    packed = [tensor[0, :, :1] for tensor in make_inputs(1, 7, 9, 1, 32, torch.float32, device)]
    lengths = (*(torch.tensor([0, 4, length], dtype=torch.int32, device=device) for length in (7, 9)), 4, 5)
    seed = torch.tensor([4, 0], device=device)
    key_lengths = torch.tensor([20, 7], dtype=torch.int32, device=device)

    def attend(q, k, v):
        return attention.attention(q, k, v, dropout_p=dropout_p, seed=seed, key_lengths=key_lengths, impl=impl)

    def attend_packed(q, k, v):
        return attention.varlen_attention(q, k, v, *lengths, dropout_p=dropout_p, seed=seed, impl=impl)

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    for function, tensors in ((attend, inputs), (attend_packed, packed)):
        eager = differentiate(function, *tensors)
        compiled = differentiate(torch.compile(function, fullgraph=True, backend=backend), *tensors)
        for name in eager:
            torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-5)


@both
def test_opcheck(impl, device):
    device = device if impl == "triton" else torch.device("cpu")
    q, k, v, _ = make_inputs(2, 5, 18, 1, 32, torch.float32, device)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    seed = torch.tensor([1, 0], device=device)
    operator = _attention_cpu.attention_torch_forward if impl == "torch" else attention.attention_forward
    torch.library.opcheck(operator.registered, (*inputs, None, None, seed, 5, 18, 0.1, 0.2))
    arguments = (*inputs, None, None, seed, 5, 18, 0.1, 0.2, 4, 3)
    if impl == "torch":
        torch.library.opcheck(_attention_window_cpu.window_attention_torch.registered, arguments)
    else:
        torch.library.opcheck(operator.registered, arguments, test_utils=("test_schema", "test_faketensor"))
    if impl == "triton":
        bounds = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
        q, k, v, _ = (tensor[0] for tensor in make_inputs(1, 5, 5, 1, 32, torch.float32, device))
        torch.library.opcheck(
            operator.registered, (q, k, v, bounds, bounds, None, 2, 2, 0.0, 0.2), test_utils="test_faketensor"
        )


def test_errors_say_what_to_change(device):
    q = torch.zeros(2, 3, 2, 32)
    k = torch.zeros(2, 5, 2, 32)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    cases = [
        (lambda: attention.attention(q, k, k, dropout_p=0.1), "needs a seed"),
        (lambda: attention.attention(q, k, k, dropout_p=1.5, seed=0), "dropout probability"),
        (lambda: attention.attention(q, k, k[:, :4]), "one shape"),
        (lambda: attention.attention(q, k[:, :, :1], k[:, :, :1]), "one shape"),
        (lambda: attention.attention(q[0], k[0], k[0]), "expected \\(batch"),
        (lambda: attention.attention(q[:1], k, k), "batch"),
        (lambda: attention.attention(q.half(), k, k), "one dtype"),
        (lambda: attention.attention(q, k, k, key_lengths=torch.zeros(2)), "int32"),
        (lambda: attention.attention(q, k, k, key_lengths=bounds[:1]), "expected 2"),
        (lambda: attention.varlen_attention(q, k, k, bounds, bounds, 3, 3), "expected \\(tokens"),
        (lambda: attention.varlen_attention(q[0], k[0], k[0], bounds, bounds[:1], 3, 3), "expected 2"),
        (lambda: attention.varlen_attention(q[0], k[0], k[0], bounds, bounds, 2, 3), "max_seqlen"),
        (lambda: attention.attention(q, k, k, window_size=(-2, 0)), r"window_size is \(-2, 0\)"),
        (
            lambda: attention.varlen_attention(q[0], k[0], k[0], bounds, bounds, 2, 3, window_size=(1, 1)),
            "max_seqlen_q=2",
        ),
        (lambda: attention.SelfAttention(30, 4), "multiple"),
    ]
    if _dispatch.triton is not None:
        wide = torch.zeros(1, 1, 1, 129, device=device)
        double = torch.zeros(1, 1, 1, 32, dtype=torch.float64, device=device)
        cases += [
            (lambda: attention.attention(wide, wide, wide, impl="triton"), "head_dim <= 128"),
            (lambda: attention.attention(double, double, double, impl="triton"), "float64"),
        ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@both
def test_self_attention_equals_multihead_attention(impl, device):
    device = device if impl == "triton" else torch.device("cpu")
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(64, 2, batch_first=True).to(device)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours = attention.SelfAttention(64, 2, dropout=0.1).to(device)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 11, 64, device=device)
    key_lengths = torch.tensor([11, 4], dtype=torch.int32, device=device)
    ignored = torch.arange(11, device=device) >= key_lengths[:, None]
    expected = theirs(x, x, x, key_padding_mask=ignored, need_weights=False)[0]
    ours.eval()
    got = ours(x, key_lengths=key_lengths, impl=impl)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), list(ours.parameters())),
        torch.autograd.grad(expected.square().sum(), list(theirs.parameters())),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    ours.train()
    dropped = ours(x, seed=1, impl=impl)
    assert not torch.equal(dropped, ours(x, seed=2, impl=impl))
    assert torch.equal(dropped, ours(x, seed=1, impl=impl))
    with pytest.raises(ValueError, match="seed"):
        ours(x, impl=impl)


GPU_CASES = [
    (dtype, head_dim, dropout_p)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for head_dim in (32, 64, 128)
    for dropout_p in (0.0, 0.1)
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim, dropout_p", GPU_CASES, ids=str)
@pytest.mark.parametrize("lengths", [(512, 512), (77, 512), (1023, 301)], ids=str)
def test_every_configuration_at_real_sizes(dtype, head_dim, dropout_p, lengths, device):
    inputs = make_inputs(4, *lengths, 12, head_dim, dtype, device)

    def by_definition(q, k, v):
        return attend_by_definition(q, k, v, dropout_p, 3)

    ours = differentiate(lambda q, k, v: attention.attention(q, k, v, dropout_p=dropout_p, seed=3), *inputs)
    assert_exact(ours, by_definition, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim, dropout_p", GPU_CASES, ids=str)
@pytest.mark.parametrize("length, window", [(1024, (64, 64)), (301, (7, -1))], ids=str)
def test_every_configuration_of_windows_at_real_sizes(dtype, head_dim, dropout_p, length, window, device):
    inputs = make_inputs(4, length, length, 12, head_dim, dtype, device)

    def by_definition(q, k, v):
        return attend_by_definition(q, k, v, dropout_p, 3, 0, window)

    ours = differentiate(
        lambda q, k, v: attention.attention(q, k, v, dropout_p=dropout_p, seed=3, window_size=window), *inputs
    )
    assert_exact(ours, by_definition, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim, dropout_p", GPU_CASES, ids=str)
def test_backward_repeats_bitwise_a_hundred_times(dtype, head_dim, dropout_p, device):
    inputs = make_inputs(32, 512, 512, 12, head_dim, dtype, device)

    def run():
        return differentiate(lambda q, k, v: attention.attention(q, k, v, dropout_p=dropout_p, seed=3), *inputs)

    first = run()
    for _ in range(100):
        for name, result in run().items():
            assert torch.equal(result, first[name]), name


@pytest.mark.gpu
def test_packed_documents_at_real_sizes(device):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 513, (300,), generator=generator)
    bounds = F.pad(lengths.cumsum(0), (1, 8), value=0)
    bounds[-8:] = bounds[-9]
    bounds = bounds.int().to(device)
    total = int(bounds[-1])
    q, k, v, grad = (tensor[0] for tensor in make_inputs(1, total, total, 12, 64, torch.bfloat16, device))
    ours = differentiate(
        lambda q, k, v: attention.varlen_attention(q, k, v, bounds, bounds, 512, 512, dropout_p=0.1, seed=3),
        q, k, v, grad,
    )  # fmt: skip

    def by_definition(q, k, v):
        return attend_sequences(q, k, v, lengths.tolist(), lengths.tolist(), 0.1, 3)

    assert_exact(ours, by_definition, (q, k, v, grad))


@pytest.mark.gpu
def test_graph_replay_with_a_new_seed_changes_the_mask(device):
    q, k, v, _ = make_inputs(4, 128, 128, 2, 64, torch.bfloat16, device)
    seed = torch.tensor([1, 0], device=device)

    def attend():
        return attention.attention(q, k, v, dropout_p=0.1, seed=seed)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    replayed = []
    for key in (1, 2):
        seed[0] = key
        graph.replay()
        assert torch.equal(out, attend())
        replayed.append(out.clone())
    assert not torch.equal(*replayed)


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_than_2_to_31_elements(device):
    """Rows at the end of a large batch equal the same rows computed alone."""
    batch = (1 << 31) // (512 * 16 * 128) + 2
    qkv = torch.randn(batch, 512, 3, 16, 128, device=device, dtype=torch.bfloat16)
    grad = torch.randn(batch, 512, 16, 128, device=device, dtype=torch.bfloat16)
    whole = differentiate(attention.attention, *qkv.unbind(2), grad)
    last = differentiate(attention.attention, *qkv[-2:].unbind(2), grad[-2:])
    assert torch.equal(whole["out"][-2:], last["out"])
    for name in ("dq", "dk", "dv"):
        # Few heads are divided among more programs: sums in another order.
        torch.testing.assert_close(whole[name][-2:], last[name], rtol=2e-2, atol=2e-2)


def test_more_documents_than_a_grid_is_deep(monkeypatch, device):
    """CUDA's grids hold 65535 programs in their second and third dimension."""
    grids = []
    monkeypatch.setattr(attention, "launch", lambda kernel, grid, *arguments, **options: grids.append(grid))
    q = torch.zeros(4, 2, 32, device=device, requires_grad=True)
    bounds = torch.zeros(70_001, dtype=torch.int32, device=device)
    bounds[-1] = 4
    attention.varlen_attention(q, q, q, bounds, bounds, 4, 4, impl="triton").sum().backward()
    assert [grid[2] for grid in grids] == [attention.MAX_SEQUENCES, 70_000 - attention.MAX_SEQUENCES] * 2
    many = torch.zeros(attention.MAX_SEQUENCES + 1, 1, 1, 32, device=device)
    with pytest.raises(ValueError, match="split the batch"):
        attention.attention(many, many, many, impl="triton")


def test_documents_of_several_launches(monkeypatch, device):
    inputs, lengths = make_packed(torch.float32, device)

    def attend(q, k, v):
        return attention.varlen_attention(q, k, v, *lengths, dropout_p=0.1, seed=3, impl="triton")

    whole = differentiate(attend, *inputs)
    monkeypatch.setattr(attention, "MAX_SEQUENCES", 4)
    assert len(LENGTHS_Q) > 4
    parts = differentiate(attend, *inputs)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
