"""The fused embeddings against PyTorch's own operations and Hugging Face's modules."""

import pytest
import torch
from accuracy import assert_as_exact_as_torch
from fastroberta_kernels import embedding, philox
from fastroberta_kernels.embedding import Embeddings, create_positions_torch, embedding_layer_norm
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NAMES = ("word", "position", "token type", "norm weight", "norm bias")
IMPLS = ["torch", "triton"]
# Of the tables, then of the output.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32 to bf16": (torch.float32, torch.bfloat16),
}


def make_ids(batch, length, num_words, padding_idx=1, seed=0):
    """Few distinct ids and one very frequent one, padding at the end of some rows and in the middle of one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, min(num_words, 12), (batch, length), generator=generator)
    ids[:, ::3] = 5 % num_words
    ids[0, : length // 8] = num_words - 1
    ids[batch // 2, length - length // 3 :] = padding_idx
    ids[-1, length // 2 : length // 2 + 1] = padding_idx
    return ids


def make_weights(num_words, num_positions, num_types, width, dtype=torch.float32, device="cpu"):
    """Tables with outlier channels, one row with a mean of 100; biases of order one."""
    generator = torch.Generator().manual_seed(width)
    shapes = [(num_words, width), (num_positions, width), (num_types, width), (width,), (width,)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[0][:, ::7] *= 30
    weights[0][5 % num_words] += 100
    return [weight.to(device, dtype).requires_grad_() for weight in weights]


def run_torch(ids, weights, dtype, output_dtype, *, token_type_ids=None, position_ids=None, padding_idx=None,
              padding_positions=True, keep=None, scale=1.0):  # fmt: skip
    """The same out of PyTorch's operations, all in `dtype`."""
    word, position, types, weight, bias = (tensor.to(dtype) for tensor in weights)
    position_padding_idx = padding_idx if padding_positions else None
    if position_ids is None:
        position_ids = create_positions_torch(ids, position_padding_idx)
    x = F.embedding(ids, word, padding_idx) + F.embedding(position_ids, position, position_padding_idx)
    x = x + F.embedding(torch.zeros_like(ids) if token_type_ids is None else token_type_ids, types)
    y = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return (y if keep is None else torch.where(keep, y, 0) * scale).to(output_dtype)


def check_against_torch(ids, weights, dtype, output_dtype, impl, p=0.0, **settings):
    device = ids.device
    keep = None
    if p:
        seed = philox.as_seed(7, device)
        keep = philox.dropout_keep_torch(seed, p, ids.numel(), weights[0].shape[1]).view(*ids.shape, -1)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn((*ids.shape, weights[0].shape[1]), generator=generator).to(device, output_dtype)
    results = []
    for work_dtype, final_dtype in ((torch.float64, torch.float64), (dtype, output_dtype), (None, None)):
        leaves = [weight.detach().to(work_dtype or weight.dtype).requires_grad_() for weight in weights]
        if work_dtype is None:
            settings.update(p=p, seed=7 if p else None, dtype=output_dtype, impl=impl)
            y = embedding_layer_norm(ids, *leaves, **settings)
        else:
            y = run_torch(ids, leaves, work_dtype, final_dtype, keep=keep, scale=philox.dropout_scale(p), **settings)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for name, exact, theirs, ours in zip(("output", *NAMES), *results):
        assert_as_exact_as_torch(ours, theirs, exact, f"{name} {impl}")
    if p:
        assert torch.equal(results[2][0] == 0, ~keep), "the dropout mask is the twin's"
    return results[2]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    "batch, length, width",
    [
        (1, 1, 3),  # the smallest; a single column would have no variance
        (3, 37, 24),  # runs of equal ids that lie within, end in, and cross blocks of 32
        (2, 5, 768),  # RoBERTa's width
    ],
)
def test_as_exact_as_torch(impl, dtypes, batch, length, width, device):
    ids = make_ids(batch, length, 29).to(device)
    weights = make_weights(29, length + 3, 2, width, dtypes[0], device)
    check_against_torch(ids, weights, *dtypes, impl, padding_idx=1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["fp32 to bf16"]], ids=["fp32", "fp32 to bf16"])
@pytest.mark.parametrize("width", [40, 96])  # not a multiple of 16, and one
def test_dropout(impl, dtypes, width, device):
    ids = make_ids(3, 11, 29).to(device)
    weights = make_weights(29, 20, 1, width, dtypes[0], device)
    check_against_torch(ids, weights, *dtypes, impl, p=0.25, padding_idx=1)


SETTINGS = {
    "BERT": dict(),
    "BERT with padding": dict(padding_idx=1, padding_positions=False),
    "token types": dict(padding_idx=1, token_type_ids=True),
    "given positions": dict(padding_idx=1, position_ids=True),
    "positions for all": dict(padding_idx=1, position_ids="row"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_settings(impl, settings, device):
    ids = make_ids(3, 37, 29).to(device)
    settings = dict(settings)
    if "token_type_ids" in settings:
        settings["token_type_ids"] = (ids > 4).long()
    if "position_ids" in settings:
        row = torch.arange(37, device=device).flip(0) // 2
        settings["position_ids"] = row if settings["position_ids"] == "row" else (ids + row) % 40
    weights = make_weights(29, 40, 2, 24, device=device)
    _, word, position, *_ = check_against_torch(ids, weights, torch.float32, torch.float32, impl, **settings)
    if "padding_idx" in settings:
        assert word[1].eq(0).all(), "padding's row has no gradient"
        assert position[1].eq(0).all() == settings.get("padding_positions", True)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_id_for_every_token(impl, device):
    # A single run over many blocks: all of it goes through partial sums.
    ids = torch.full((4, 80), 5, device=device)
    weights = make_weights(6, 90, 1, 16, device=device)
    check_against_torch(ids, weights, torch.float32, torch.float32, impl, padding_idx=1)


def test_positions_count_tokens_that_are_not_padding(device):
    ids = torch.tensor([[0, 5, 6, 1, 1], [1, 1, 0, 1, 9]])
    expected = torch.tensor([[2, 3, 4, 1, 1], [1, 1, 2, 1, 3]])
    assert torch.equal(create_positions_torch(ids, 1), expected)
    ids = make_ids(3, 37, 29)
    weights = [weight.detach() for weight in make_weights(29, 40, 1, 16, device=device)]
    positions = embedding._forward_op(ids.to(device), None, None, *weights, None, 1, True, 0.0, 1e-5, torch.float32)[1]
    assert torch.equal(positions.cpu().long(), create_positions_torch(ids, 1))


def test_dropout_keeps_its_share_and_follows_seed_and_first_row(device):
    ids = make_ids(4, 16, 29).to(device)
    weights = make_weights(29, 20, 1, 64, device=device)

    def run(impl, seed, ids=ids):
        return embedding_layer_norm(ids, *weights, p=0.1, seed=seed, padding_idx=1, impl=impl)

    for impl in IMPLS:
        y = run(impl, 3)
        share = (y != 0).double().mean().item()
        assert abs(share - 230 / 256) < 6 * (0.1 * 0.9 / y.numel()) ** 0.5
        assert not torch.equal(y, run(impl, 4))
        # The second half of the batch with the first row of that half draws what the whole batch draws there.
        half = run(impl, torch.tensor([3, 2 * 16], device=device), ids[2:])
        assert torch.equal(half == 0, y[2:] == 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl, device):
    ids = make_ids(3, 11, 29).to(device)
    weights = make_weights(29, 20, 1, 24, device=device)
    expected = embedding_layer_norm(ids, *weights, padding_idx=1, impl=impl)
    gradients = torch.autograd.grad(expected.sin().sum(), weights)
    spread = [torch.stack((weight.detach(),) * 2, -1)[..., 0].requires_grad_() for weight in weights]
    wide_ids = torch.stack((ids, ids), -1)[..., 0]
    y = embedding_layer_norm(wide_ids, *spread, padding_idx=1, impl=impl)
    assert torch.equal(y, expected)
    # The transposed sine makes the upstream gradient one that is not contiguous.
    strided = torch.autograd.grad(y.transpose(0, 1).contiguous().sin().sum(), spread)
    for mine, expected_gradient in zip(strided, gradients):
        torch.testing.assert_close(mine, expected_gradient)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch, length", [(0, 3), (3, 0)])
def test_no_tokens(impl, batch, length, device):
    ids = torch.zeros((batch, length), dtype=torch.int64, device=device)
    weights = make_weights(29, 20, 1, 24, device=device)
    y = embedding_layer_norm(ids, *weights, padding_idx=1, impl=impl)
    assert y.shape == (batch, length, 24)
    y.sum().backward()
    assert all(weight.grad.eq(0).all() for weight in weights)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_gradients_that_are_asked_for(impl, device):
    ids = make_ids(3, 11, 29).to(device)
    weights = make_weights(29, 20, 2, 24, device=device)
    full = torch.autograd.grad(embedding_layer_norm(ids, *weights, padding_idx=1, impl=impl).sin().sum(), weights)
    for wanted in range(5):
        alone = [weight.detach().requires_grad_(index == wanted) for index, weight in enumerate(weights)]
        embedding_layer_norm(ids, *alone, padding_idx=1, impl=impl).sin().sum().backward()
        for index, leaf in enumerate(alone):
            assert (leaf.grad is None) == (index != wanted)
        assert torch.equal(alone[wanted].grad, full[wanted]), NAMES[wanted]


def test_library_registration(device):
    ids = make_ids(2, 7, 29).to(device)
    weights = make_weights(29, 20, 2, 16, device=device)
    types = (ids > 4).long()
    seed = philox.as_seed(3, device)
    torch.library.opcheck(
        embedding._forward_op.registered, (ids, None, types, *weights, seed, 1, True, 0.2, 1e-5, torch.bfloat16)
    )
    weights = [weight.detach() for weight in weights]
    positions = create_positions_torch(ids, 1).int()
    dy = torch.randn((2, 7, 16), device=device)
    arguments = (dy, ids, positions, types, *weights, seed, 1, True, 0.2, 1e-5)
    torch.library.opcheck(embedding._backward_op.registered, (*arguments, [True, False, True]))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_checkpointed_and_repeated_runs_agree(impl, device):
    ids = make_ids(3, 11, 29).to(device)
    weights = make_weights(29, 20, 1, 24, device=device)
    seed = torch.tensor([5], device=device)

    def run(*weights):
        return embedding_layer_norm(ids, *weights, padding_idx=1, p=0.2, seed=seed, impl=impl).sin()

    def step(function):
        y = function(*weights)
        return y.detach(), *torch.autograd.grad(y.sum(), weights)

    expected = step(run)
    others = {
        "repeated": step(run),
        "compiled": step(torch.compile(run, fullgraph=True, backend="aot_eager")),
        "checkpointed": step(lambda *weights: checkpoint(run, *weights, use_reentrant=False)),
    }
    for name, results in others.items():
        for one, other in zip(expected, results):
            assert torch.equal(one, other), name


def make_arguments(**changes):
    arguments = dict(
        input_ids=torch.tensor([[0, 4, 2, 1]]),
        word_weight=torch.zeros(9, 8),
        position_weight=torch.zeros(6, 8),
        token_type_weight=torch.zeros(1, 8),
        norm_weight=torch.ones(8),
        norm_bias=torch.zeros(8),
        padding_idx=1,
    )
    return {**arguments, **changes}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(input_ids=torch.zeros(4, dtype=torch.int64)), r"expected int64 \(B, L\)"),
        (dict(input_ids=torch.zeros(1, 4)), r"expected int64 \(B, L\)"),
        (dict(position_weight=torch.zeros(6, 7)), r"position_weight is \(6, 7\), expected \(rows, 8\)"),
        (dict(norm_bias=torch.zeros(9)), "norm_bias"),
        (dict(input_ids=torch.zeros(1, 5, dtype=torch.int64)), "5 tokens are too many for 6 positions.*to 4"),
        (dict(position_ids=torch.zeros(1, 3, dtype=torch.int64)), "position_ids"),
        (dict(token_type_ids=torch.zeros(1, 3, dtype=torch.int64)), "token_type_ids"),
        (dict(token_type_ids=torch.zeros(1, 4, dtype=torch.int64), token_type_weight=None), "need token_type_weight"),
        (dict(padding_idx=9), "padding_idx=9 is outside the 9 rows"),
        (dict(p=0.1), "needs a seed"),
        (dict(p=1.5, seed=1), "dropout probability"),
        (dict(impl="cuda"), "use None, 'triton' or 'torch'"),
    ],
)
def test_errors_say_what_to_change(impl, changes, message):
    with pytest.raises(ValueError, match=message):
        embedding_layer_norm(**make_arguments(**{"impl": impl, **changes}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(input_ids=torch.tensor([[0, 9]])), "token id 9 is outside the table of 9 rows"),
        (dict(input_ids=torch.tensor([[0, -1]])), "token id -1 is outside"),
        (dict(position_ids=torch.tensor([0, 1, 6, 3])), "position 6 is outside the table of 6 rows"),
        (dict(token_type_ids=torch.tensor([[0, 1, 0, 0]])), "token type 1 is outside the table of 1 rows"),
    ],
)
def test_ids_outside_their_table(changes, message, device):
    for impl in IMPLS:
        if device.type == "cpu":
            with pytest.raises(ValueError, match=message):
                embedding_layer_norm(**make_arguments(**changes, impl=impl))
    if device.type == "cuda":
        arguments = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in make_arguments(**changes).items()
        }
        assert embedding_layer_norm(**arguments).isnan().any()


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("impl", IMPLS)
def test_module_equals_hugging_faces(kind, impl, device):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=29, hidden_size=24, num_attention_heads=2, max_position_embeddings=24, type_vocab_size=2)
    if kind == "roberta":
        from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

        theirs = RobertaEmbeddings(transformers.RobertaConfig(**sizes, pad_token_id=1))
        mine = Embeddings(29, 24, 24, 2, 1, layer_norm_eps=1e-12)
    else:
        from transformers.models.bert.modeling_bert import BertEmbeddings

        theirs = BertEmbeddings(transformers.BertConfig(**sizes, pad_token_id=0))
        mine = Embeddings(29, 24, 24, 2, 0, layer_norm_eps=1e-12, padding_positions=False)
    mine.load_state_dict(theirs.state_dict())
    mine, theirs = mine.to(device).eval(), theirs.to(device).eval()
    ids = make_ids(3, 17, 29, padding_idx=mine.padding_idx).to(device)
    ours, expected = mine(ids, impl=impl), theirs(ids)
    torch.testing.assert_close(ours, expected)
    for y in (ours, expected):
        y.sin().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_module_drops_in_training_only():
    module = Embeddings(29, 24, 24, 1, 1, dropout=0.5)
    ids = make_ids(3, 17, 29)
    assert (module(ids, seed=3) == 0).any()
    with pytest.raises(ValueError, match="needs a seed"):
        module(ids)
    assert not (module.eval()(ids) == 0).any()
    assert module(ids, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("width", [64, 128, 256, 512, 768, 1023, 1024, 2048, 4096])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_gpu_every_configuration(dtypes, width, p):
    ids = make_ids(4, 509, 50265).cuda()
    weights = make_weights(50265, 514, 2, width, dtypes[0], "cuda")
    check_against_torch(ids, weights, *dtypes, "triton", p=p, padding_idx=1)
    check_against_torch(ids, weights, *dtypes, "triton", p=p, token_type_ids=(ids > 5).long())


@pytest.mark.gpu
def test_gpu_hundred_backwards_are_the_same_bits():
    ids = make_ids(64, 512, 50265).cuda()
    weights = make_weights(50265, 514, 1, 768, device="cuda")
    expected = None
    for _ in range(100):
        y = embedding_layer_norm(ids, *weights, padding_idx=1, p=0.1, seed=1, dtype=torch.bfloat16)
        gradients = torch.autograd.grad(y.float().sin().sum(), weights)
        expected = expected or gradients
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected))


@pytest.mark.gpu
def test_gpu_graph_replay_draws_new_masks_and_compiled_equals_eager():
    ids = make_ids(4, 512, 50265).cuda()
    weights = make_weights(50265, 514, 1, 768, device="cuda")
    seed = torch.tensor([1, 0], device="cuda")

    def step(*weights):
        return embedding_layer_norm(ids, *weights, padding_idx=1, p=0.1, seed=seed)

    def run(function):
        y = function(*weights)
        return y.detach(), *torch.autograd.grad(y.sin().sum(), weights)

    expected = run(step)
    for one, other in zip(expected, run(torch.compile(step, fullgraph=True))):
        torch.testing.assert_close(one, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(step)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, captured))
    seed.fill_(2)
    graph.replay()
    assert not torch.equal(captured[0] == 0, expected[0] == 0)
    assert torch.equal(captured[0], step(*weights))


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_gpu_more_than_two_to_the_31_elements():
    ids = make_ids(4200, 512, 50265).cuda()
    weights = make_weights(50265, 514, 1, 1024, torch.bfloat16, "cuda")
    assert ids.numel() * 1024 > 2**31
    y = embedding_layer_norm(ids, *weights, padding_idx=1)
    expected = embedding_layer_norm(ids[-2:], *weights, padding_idx=1, impl="torch")
    torch.testing.assert_close(y[-2:], expected, rtol=1e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(y, weights[4], torch.ones_like(y))
    assert gradient.float().sub(ids.numel()).abs().max() <= ids.numel() * 2**-8
