"""Rotary positions: exactness, tables, layouts, every way to call it."""

from __future__ import annotations

import pytest
import torch
from accuracy import (
    assert_as_exact_as_torch,
    assert_compiled_equals_eager,
    assert_equal,
    assert_gradients_as_exact_as_torch,
)
from fastroberta_kernels import _dispatch, rotary
from fastroberta_kernels.rotary import apply_rotary, make_tables

needs_triton = pytest.mark.skipif(_dispatch.triton is None, reason="needs the package triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])

# One pair and one token; dimensions that fill no block; several tiles of tokens; the sizes of ModernBERT.
SHAPES = [(1, 1, 1, 2), (2, 7, 3, 24), (300, 2, 32), (1, 5, 2, 64)]


def make_inputs(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    # Tables of distant positions, so that all angles occur.
    cos, sin = (table[-shape[-3] :].to(device) for table in make_tables(5000, shape[-1]))
    return {"q": q, "k": k}, cos, sin, torch.randn((2, *shape), generator=generator).to(device, dtype)


def compose(cos, sin):
    """As transformers composes it, from tables whose columns are repeated."""

    def rotate(x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide_cos, wide_sin = (torch.cat((table, table), -1).unsqueeze(-2).to(x.device, dtype) for table in (cos, sin))
        first, second = x.to(dtype).chunk(2, -1)
        return (x.to(dtype) * wide_cos + torch.cat((-second, first), -1) * wide_sin).to(x.dtype)

    return lambda q, k: torch.stack((rotate(q), rotate(k)))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotation_is_as_exact_as_torch(impl, dtype, shape, device):
    inputs, cos, sin, dy = make_inputs(shape, dtype, device if impl == "triton" else "cpu")
    assert_gradients_as_exact_as_torch(
        lambda q, k: torch.stack(apply_rotary(q, k, cos, sin, impl=impl)), compose(cos.cpu(), sin.cpu()), inputs, dy
    )


@both
def test_scores_depend_on_the_distance_alone(impl, device):
    device = device if impl == "triton" else "cpu"
    q, k = (x.expand(9, 1, 32) for x in torch.randn(2, 1, 1, 32, device=device))
    q, k = apply_rotary(q, k, *make_tables(9, 32, theta=100.0, device=device), impl=impl)
    scores = q[:, 0] @ k[:, 0].T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.1


def test_tables_hold_powers_of_theta():
    cos, sin = make_tables(3, 4, theta=160_000.0)
    assert cos.shape == sin.shape == (3, 2) and cos.dtype == torch.float32
    torch.testing.assert_close(cos[2], torch.tensor([2.0, 2.0 / 400]).cos())
    torch.testing.assert_close(sin[2], torch.tensor([2.0, 2.0 / 400]).sin())
    # In fp32 angles of distant positions would be off by more than this.
    assert torch.equal(make_tables(8192, 2)[1][-1], torch.tensor([8191.0], dtype=torch.float64).sin().float())


@both
def test_one_row_of_tables_for_each_token(impl, device):
    """Packed documents count their own positions; the tables are then indexed by token."""
    device = device if impl == "triton" else "cpu"
    inputs, cos, sin, _ = make_inputs((2, 6, 2, 16), torch.float32, device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [5, 4, 3, 2, 1, 0]], device=device)
    got = apply_rotary(*inputs.values(), cos[positions], sin[positions], impl=impl)
    for b in range(2):
        part = [tensor[b] for tensor in inputs.values()]
        expected = apply_rotary(*part, cos[positions[b]], sin[positions[b]], impl=impl)
        assert all(torch.equal(one[b], other) for one, other in zip(got, expected))


@both
@pytest.mark.parametrize("head_dim", [32, 12])  # read in place, and copied for alignment
def test_layouts(impl, head_dim, device):
    device = device if impl == "triton" else "cpu"
    inputs, cos, sin, dy = make_inputs((2, 5, 3, head_dim), torch.float32, device)
    plain = [tensor.detach() for tensor in inputs.values()]
    wide_cos, wide_sin = (torch.cat((table, table), -1)[:, : head_dim // 2] for table in (cos, sin))
    fused = torch.stack((*plain, plain[0]), 2).requires_grad_()
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in plain]

    def run(q, k, inputs, cos=cos, sin=sin):
        out = torch.stack(apply_rotary(q, k, cos, sin, impl=impl))
        return out, *torch.autograd.grad(out, inputs, dy)

    out, dq, dk = run(*inputs.values(), list(inputs.values()))
    got, dfused = run(*fused.unbind(2)[:2], [fused], wide_cos, wide_sin)
    assert torch.equal(got, out) and torch.equal(dfused[:, :, 0], dq) and torch.equal(dfused[:, :, 1], dk)
    assert all(map(torch.equal, run(*heads_first, heads_first), (out, dq, dk)))


@both
def test_empty_tensors_and_one_unused_output(impl, device):
    device = device if impl == "triton" else "cpu"
    inputs, cos, sin, dy = make_inputs((2, 4, 2, 16), torch.float32, device)
    empty = inputs["q"][:0]
    assert apply_rotary(empty, empty, cos, sin, impl=impl)[0].shape == (0, 4, 2, 16)
    q, _ = apply_rotary(**inputs, cos=cos, sin=sin, impl=impl)
    dq, dk = torch.autograd.grad(q, list(inputs.values()), dy[0], allow_unused=True)
    assert dq.any() and (dk is None or not dk.any())


@both
def test_compiled_equals_eager(impl, device):
    inputs, cos, sin, dy = make_inputs((2, 4, 2, 16), torch.bfloat16, device if impl == "triton" else "cpu")
    assert_compiled_equals_eager(lambda q, k: torch.stack(apply_rotary(q, k, cos, sin, impl=impl)), inputs, dy, impl)


@needs_triton
def test_operator_is_registered_rightly(device):
    inputs, cos, sin, _ = make_inputs((2, 4, 2, 16), torch.float32, device)
    torch.library.opcheck(rotary._rotary.registered, (*inputs.values(), cos, sin, False))


@both
def test_half_precision_tables(impl, device):
    """Those of a bf16 model in transformers."""
    inputs, cos, sin, _ = make_inputs((2, 7, 2, 16), torch.bfloat16, device if impl == "triton" else "cpu")
    cos, sin = cos.bfloat16(), sin.bfloat16()
    out = torch.stack(apply_rotary(**inputs, cos=cos, sin=sin, impl=impl)).cpu()
    composed = compose(cos.cpu(), sin.cpu())
    cpu = [tensor.detach().cpu() for tensor in inputs.values()]
    assert_as_exact_as_torch(out, composed(*cpu), composed(*(tensor.double() for tensor in cpu)), "y")


def test_wrong_arguments_are_named():
    inputs, cos, sin, _ = make_inputs((2, 4, 2, 16), torch.float32)
    q, k = inputs.values()
    for arguments, message in (
        ((q, k[:1], cos, sin), "two tensors"),
        ((q, k.half(), cos, sin), "one shape and dtype"),
        ((q[0, 0], k[0, 0], cos, sin), "two tensors"),
        ((q, k, cos[1:], sin[1:]), r"must be \(4, 8\) or \(2, 4, 8\)"),
        ((q, k, cos, sin.half()), "in one dtype"),
        ((q[..., 1:], k[..., 1:], cos, sin), "head_dim even"),
        ((q.long(), k.long(), cos, sin), r"q is torch\.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_rotary(*arguments)
    with pytest.raises(ValueError, match="it must be even"):
        make_tables(4, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 48])
def test_every_configuration_at_real_sizes(dtype, head_dim, device):
    inputs, cos, sin, dy = make_inputs((8, 1023, 12, head_dim), dtype, device)
    assert_gradients_as_exact_as_torch(
        lambda q, k: torch.stack(apply_rotary(q, k, cos, sin)), compose(cos.cpu(), sin.cpu()), inputs, dy
    )
    again = [apply_rotary(**inputs, cos=cos, sin=sin) for _ in range(2)]
    assert_equal(*({"q": q, "k": k} for q, k in again))
