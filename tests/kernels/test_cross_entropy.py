"""The fused linear layer and cross-entropy against PyTorch's two operations, the head against Hugging Face's."""

import pytest
import torch
from accuracy import assert_as_exact_as_torch
from fastroberta_kernels import cross_entropy
from fastroberta_kernels.cross_entropy import MaskedLMHead, linear_cross_entropy, linear_cross_entropy_torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SEED = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("hidden", "weight", "bias")


def make_inputs(num_rows, num_entries, width, dtype, device="cpu", num_classes=None, parameter_dtype=None):
    """Hidden states with outlier channels, logits of a few units with biases of order one, every fifth row ignored."""
    generator = torch.Generator().manual_seed(num_rows * num_entries + width)
    hidden = torch.randn(num_rows, width, generator=generator)
    hidden[:, ::7] *= 30
    weight = torch.randn(num_entries, width, generator=generator) / (10 * width**0.5)
    bias = torch.randn(num_entries, generator=generator)
    targets = torch.randint(0, num_classes or num_entries, (num_rows,), generator=generator)
    targets[1::5] = -100
    parameter_dtype = parameter_dtype or dtype
    leaves = [hidden.to(dtype), weight.to(parameter_dtype), bias.to(parameter_dtype)]
    return [leaf.to(device).requires_grad_() for leaf in leaves], targets.to(device)


def compute_reference(leaves, targets, dtype, upstream, reduction, label_smoothing, z_loss, num_classes, hidden_dtype):
    """Loss and gradients by F.linear and F.cross_entropy, products in `hidden_dtype`, the loss at least in fp32."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    logits = F.linear(*(leaf.to(hidden_dtype) for leaf in leaves))[:, :num_classes]
    logits = logits if dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    loss = loss + z_loss * logits.logsumexp(1).square() * (targets != -100)
    if reduction != "none":
        loss = loss.sum() / ((targets != -100).sum() if reduction == "mean" else 1)
    loss.backward(upstream.to(loss.dtype))
    num_correct = (logits.argmax(1) == targets).sum()
    return [loss.detach(), *(leaf.grad for leaf in leaves)], num_correct


def check_against_torch(leaves, targets, impl, reduction="mean", label_smoothing=0.0, z_loss=0.0, num_classes=None):
    num_classes = num_classes or leaves[1].shape[0]
    upstream = torch.rand(targets.shape, generator=torch.Generator().manual_seed(SEED)).to(targets.device) + 0.5
    upstream = upstream if reduction == "none" else upstream.sum() / 8
    settings = dict(label_smoothing=label_smoothing, z_loss=z_loss, reduction=reduction, num_classes=num_classes)
    exact, _ = compute_reference(leaves, targets, torch.float64, upstream, hidden_dtype=torch.float64, **settings)
    theirs, num_correct = compute_reference(leaves, targets, None, upstream, hidden_dtype=leaves[0].dtype, **settings)
    for leaf in leaves:
        leaf.grad = None
    output = linear_cross_entropy(*leaves, targets, impl=impl, **settings)
    output.loss.backward(upstream)
    ours = [output.loss, *(leaf.grad for leaf in leaves)]
    for name, mine, torchs, truth in zip(("loss", *NAMES), ours, theirs, exact):
        assert_as_exact_as_torch(mine.detach(), torchs, truth, f"{name} {impl} {reduction}")
    assert output.num_correct.item() == num_correct.item()
    assert output.num_targets.item() == (targets != -100).sum().item()
    assert output.num_correct.dtype == output.num_targets.dtype == torch.int64
    assert leaves[0].grad[targets == -100].eq(0).all(), "ignored rows have no gradient"
    assert leaves[1].grad[num_classes:].eq(0).all() and leaves[2].grad[num_classes:].eq(0).all()


def test_class_of_no_probability_leaves_gradients_finite():
    """The twin fills up its rows; a bias of -inf must not meet their zeros."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator).requires_grad_() for rows in (5, 20))
    bias = torch.zeros(20).index_fill(0, torch.tensor(3), -torch.inf).requires_grad_()
    linear_cross_entropy(hidden, weight, bias, torch.tensor([0, 1, 2, 4, 5]), impl="torch").loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in (hidden, weight, bias))
    assert weight.grad[3].eq(0).all() and bias.grad[3] == 0


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, cache blocks and class slices in shapes that the interpreter can run."""
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda num_rows: 16)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ROWS_TORCH", 16)
    monkeypatch.setattr(cross_entropy, "_ROWS_IN_CACHE", 5)
    monkeypatch.setattr(cross_entropy, "_CLASSES_IN_CACHE", 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "num_rows, num_entries, num_classes, width",
    [
        (1, 1, 1, 1),  # the smallest: one class has the loss zero
        (13, 1023, 1023, 7),  # odd everywhere
        (600, 211, 197, 16),  # two chunks of rows, padded vocabulary
        (5, 50304, 50265, 8),  # RoBERTa's vocabulary, padded as the trainer does
    ],
)
def test_twin_is_as_exact_as_torch(num_rows, num_entries, num_classes, width, dtype):
    inputs = make_inputs(num_rows, num_entries, width, dtype, num_classes=num_classes)
    check_against_torch(*inputs, "torch", num_classes=num_classes)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype, reduction", list(zip(DTYPES, ("mean", "sum", "none"))))
def test_reductions_chunk_by_chunk(small_chunks, impl, dtype, reduction, device):
    inputs = make_inputs(41, 131, 48, dtype, device, num_classes=127)
    check_against_torch(*inputs, impl, reduction=reduction, num_classes=127)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "reduction, label_smoothing, z_loss", [("mean", 0.1, 0.0), ("none", 0.0, 1e-2), ("none", 0.1, 1e-2)]
)
def test_label_smoothing_and_z_loss(small_chunks, impl, reduction, label_smoothing, z_loss, device):
    inputs = make_inputs(41, 131, 48, torch.float32, device, num_classes=127)
    check_against_torch(*inputs, impl, reduction, label_smoothing, z_loss, num_classes=127)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_takes_several_steps_a_row(dtype, device):
    check_against_torch(*make_inputs(6, 4500, 8, dtype, device, num_classes=4499), "triton", num_classes=4499)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_parameters_with_narrow_hidden_states(small_chunks, impl, dtype, device):
    inputs = make_inputs(41, 131, 48, dtype, device, parameter_dtype=torch.float32)
    check_against_torch(*inputs, impl)
    assert [leaf.grad.dtype for leaf in inputs[0]] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_small_upstream_gradients_do_not_underflow_in_fp16(impl, device):
    # 1e-9 is zero in fp16: multiplied into the logits' gradient before the products, nothing would be left.
    (hidden, weight, bias), targets = make_inputs(4, 64, 8, torch.float16, device, parameter_dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, bias, targets, impl=impl).loss
    small, full = (torch.autograd.grad(loss * scale, weight, retain_graph=True)[0] for scale in (1e-9, 1.0))
    torch.testing.assert_close(small * 1e9, full)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_upstream_gradient_is_not_rounded_to_bf16(impl, device):
    # 1 + 3/512 lies between the bf16 numbers 1 and 1 + 4/512: rounded, it would shift every gradient by 0.2%.
    (hidden, weight, bias), targets = make_inputs(40, 131, 48, torch.bfloat16, device)
    loss = linear_cross_entropy(hidden, weight, bias, targets, reduction="sum", impl=impl).loss
    one, scaled = (
        torch.autograd.grad(loss, hidden, torch.tensor(scale, device=device), retain_graph=True)[0].double()
        for scale in (1.0, 1 + 3 / 512)
    )
    assert ((scaled * one.sign()).sum() / one.abs().sum()).item() == pytest.approx(1 + 3 / 512, abs=5e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_weight_gradient_is_accumulated_in_fp32(small_chunks, impl, device):
    # Chunks of 16 rows each add 8 to a sum that would stop growing at 2048 in bf16.
    num_rows = 64 if impl == "triton" else 4096
    hidden = torch.full((num_rows, 1), 1.0, dtype=torch.bfloat16, device=device)
    weight = torch.zeros((2, 1), dtype=torch.float32, device=device, requires_grad=True)
    targets = torch.zeros(num_rows, dtype=torch.int64, device=device)
    targets[:8] = 1
    linear_cross_entropy(hidden, weight, None, targets, reduction="sum", impl=impl).loss.backward()
    torch.testing.assert_close(weight.grad[:, 0].cpu(), torch.tensor([-1.0, 1.0]) * (num_rows / 2 - 8), rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_tie_counts_for_the_first_class(impl, device):
    hidden = torch.ones((3, 1), device=device)
    weight = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0], device=device)[:, None]
    targets = torch.tensor([1, 3, 4], device=device)
    assert linear_cross_entropy(hidden, weight, None, targets, impl=impl).num_correct.item() == 1


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_padding_is_no_class_even_with_the_largest_logit(impl, device):
    hidden = torch.ones((2, 1), device=device)
    weight = torch.tensor([0.0, 1.0, 90.0], device=device)[:, None]
    targets = torch.ones(2, dtype=torch.int64, device=device)
    output = linear_cross_entropy(hidden, weight, None, targets, num_classes=2, impl=impl)
    assert output.num_correct.item() == 2
    assert output.loss.item() == pytest.approx(F.cross_entropy(torch.tensor([0.0, 1.0]), torch.tensor(1)).item())


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_ignored_may_hold_nan(small_chunks, impl, parameter_dtype, reduction, device):
    """Hidden states of ignored rows, and the padding of the vocabulary."""
    leaves, targets = make_inputs(41, 40, 8, torch.bfloat16, device, parameter_dtype=parameter_dtype)
    targets[1::3] = -100
    targets[targets >= 37] = 0

    def step():
        loss = linear_cross_entropy(*leaves, targets, num_classes=37, reduction=reduction, impl=impl).loss
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    expected = step()
    with torch.no_grad():
        leaves[0][1::3] = leaves[1][37:] = leaves[2][37:] = float("nan")
    for name, one, other in zip(("loss", *NAMES), step(), expected):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(), (2, 3), (2, 1, 3), (2, 0)], ids=str)
def test_hidden_of_any_rank_and_int32_targets(impl, shape, device):
    hidden, weight = torch.randn(*shape, 8, device=device), torch.randn(40, 8, device=device)
    targets = torch.randint(40, shape, dtype=torch.int32, device=device)
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(hidden, weight, None, targets, reduction=reduction, impl=impl).loss
        flat = (hidden.reshape(-1, 8), weight, None, targets.flatten().long())
        expected = linear_cross_entropy(*flat, reduction=reduction, impl=impl).loss
        assert torch.equal(loss, expected.view(loss.shape))
    assert loss.shape == shape


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_its_sequence_is_named(position):
    """It would otherwise be a token of the sequence before or after."""
    labels, positions = torch.tensor([[7], [7]]), torch.tensor([[2], [0]])
    positions[1 if position < 0 else 0] = position
    with pytest.raises(ValueError, match=f"position {position} is outside the 5 of a sequence"):
        MaskedLMHead(8, 40)(torch.zeros(2, 5, 8), torch.zeros(40, 8), labels, positions)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("gathers", [True, False])
def test_ignored_rows_of_the_head_may_hold_nan(impl, gathers, device):
    head = MaskedLMHead(8, 40).to(device)
    hidden = torch.randn(2, 5, 8, device=device, requires_grad=True)
    positions = torch.tensor([[0, 3], [2, 4]], device=device) if gathers else None
    labels = torch.full((2, 2 if gathers else 5), -100, device=device)
    labels[:, 0] = 7
    decoder = torch.randn(40, 8, device=device, requires_grad=True)
    leaves = [hidden, decoder, *head.parameters()]

    def step():
        return torch.autograd.grad(head(hidden, decoder, labels, positions, impl=impl).loss, leaves)

    expected = step()
    with torch.no_grad():
        hidden[0, 1:], hidden[1, 3:] = float("nan"), float("nan")
    for one, other in zip(step(), expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_target_at_all(impl, reduction, num_rows, device):
    (hidden, weight, bias), targets = make_inputs(num_rows, 11, 4, torch.float32, device)
    output = linear_cross_entropy(hidden, weight, bias, targets.fill_(-100), reduction=reduction, impl=impl)
    assert output.loss.requires_grad and output.loss.eq(0).all()
    assert output.num_targets.item() == output.num_correct.item() == 0
    output.loss.sum().backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad.shape == leaf.shape and leaf.grad.eq(0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_gradient_that_is_asked_for(impl, wanted, device):
    leaves, targets = make_inputs(7, 40, 8, torch.float32, device)
    linear_cross_entropy(*leaves, targets, impl=impl).loss.backward()
    alone = [leaf.detach().requires_grad_(name == wanted) for name, leaf in zip(NAMES, leaves)]
    linear_cross_entropy(*alone, targets, impl=impl).loss.backward()
    for name, leaf, full in zip(NAMES, alone, leaves):
        assert leaf.grad is None if name != wanted else torch.equal(leaf.grad, full.grad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_without_bias_and_in_evaluation(impl, device):
    (hidden, weight, _), targets = make_inputs(7, 40, 8, torch.float32, device)
    with torch.no_grad():
        output = linear_cross_entropy(hidden, weight, None, targets, impl=impl)
        expected = F.cross_entropy(hidden @ weight.T, targets)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strided_inputs(impl, device):
    (hidden, weight, bias), targets = make_inputs(7, 40, 8, torch.float32, device)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, targets, impl=impl).loss, hidden)[0]
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    spread = [torch.stack((x.detach(), x.detach()), -1)[..., 0] for x in (weight, bias, targets)]
    assert not any(x.is_contiguous() for x in (strided, *spread))
    loss = linear_cross_entropy(strided, *spread, impl=impl).loss
    torch.testing.assert_close(torch.autograd.grad(loss, strided)[0], expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_library_registration(impl, device):
    (hidden, weight, bias), targets = make_inputs(5, 40, 8, torch.float32, device)
    for reduction in ("mean", "none"):
        settings = (-100, 0.1, 1e-3, 37)
        torch.library.opcheck(
            cross_entropy._forward_op.registered,
            (hidden, weight, bias, targets, *settings, reduction, [True] * 3, False, impl == "triton"),
        )
    inputs = [tensor.detach() for tensor in (hidden, weight, bias)]
    row_gradient = torch.rand(5, device=device)
    torch.library.opcheck(
        cross_entropy._backward_op.registered, (*inputs, targets, row_gradient, *settings, [True] * 3, impl == "triton")
    )


@pytest.mark.parametrize("impl, reduction", [("torch", "none"), ("triton", "mean")])
def test_compiled_checkpointed_and_repeated_runs_agree(small_chunks, impl, reduction, device):
    leaves, targets = make_inputs(21, 40, 8, torch.bfloat16, device)

    def run(hidden, weight, bias):
        output = linear_cross_entropy(hidden, weight, bias, targets, reduction=reduction, impl=impl)
        return output.loss.sum() * 3, output.num_correct

    def step(function):
        loss, num_correct = function(*leaves)
        return loss.detach(), num_correct, *torch.autograd.grad(loss, leaves)

    expected = step(run)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    others = {
        "repeated": step(run),
        "compiled": step(compiled),
        "checkpointed": step(lambda *inputs: checkpoint(run, *inputs, use_reentrant=False)),
    }
    for name, results in others.items():
        for one, other in zip(expected, results):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_retained_graph_gives_the_gradient_again(impl, device):
    leaves, targets = make_inputs(7, 40, 8, torch.float32, device)
    loss = linear_cross_entropy(*leaves, targets, impl=impl).loss * 0.3
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, leaves, retain_graph=True)]
    second = torch.autograd.grad(loss, leaves)
    for one, other in zip(first, second):
        assert torch.equal(one, other)


def test_second_derivative_is_refused():
    leaves, targets = make_inputs(7, 40, 8, torch.float32)
    loss = linear_cross_entropy(*leaves, targets, impl="torch").loss
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_autocast_runs_the_products_in_its_dtype():
    leaves, targets = make_inputs(7, 40, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*leaves, targets).loss
        expected = F.cross_entropy(F.linear(*leaves).float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert leaves[0].grad.dtype == torch.float32


def test_chunks_keep_to_the_promised_share_of_the_logits():
    for num_rows in range(4096, 100_000, 77):
        rows = cross_entropy._chunk_rows(num_rows)
        assert rows % 128 == 0 and 1024 <= rows <= 4096 and rows <= num_rows / 4, num_rows
    assert cross_entropy._chunk_rows(4928) == 1024
    assert cross_entropy._chunk_rows(9856) == 2048


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(2, 3, 4)), "one per row of hidden"),
        (dict(hidden=torch.zeros(())), "expected hidden"),
        (dict(weight=torch.zeros(5, 3)), "expected hidden"),
        (dict(bias=torch.zeros(4)), "bias has shape"),
        (dict(targets=torch.zeros(2, dtype=torch.int16)), "int64 or int32"),
        (dict(targets=torch.zeros(3, dtype=torch.int64)), "one per row of hidden"),
        (dict(hidden=torch.zeros(2, 4, dtype=torch.float64), impl="triton"), "use float32"),
        (dict(hidden=torch.zeros(2, 4, dtype=torch.int64)), "use float32"),
        (dict(num_classes=6), "num_classes=6 is outside 1 to 5"),
        (dict(reduction="average"), "use one of mean, sum, none"),
        (dict(label_smoothing=1.0), "label_smoothing"),
        (dict(z_loss=-1.0), "z_loss"),
        (dict(targets=torch.tensor([0, 5])), "target 5 is outside the 5 classes"),
        (dict(targets=torch.tensor([0, -1])), "target -1 is outside"),
        (dict(targets=torch.tensor([0, 4]), num_classes=4), "target 4 is outside the 4 classes"),
        (dict(impl="cuda"), "use None, 'triton' or 'torch'"),
    ],
)
def test_errors_say_what_to_change(change, message):
    arguments = dict(
        hidden=torch.zeros(2, 4), weight=torch.zeros(5, 4), bias=None, targets=torch.zeros(2, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})


def test_kernel_marks_a_target_that_is_no_class(device):
    hidden, weight = torch.zeros((2, 4), device=device), torch.zeros((5, 4), device=device)
    targets = torch.tensor([0, 5], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="target 5 is outside the 5 classes"):
            linear_cross_entropy(hidden, weight, None, targets, impl="triton")
    else:
        loss = linear_cross_entropy(hidden, weight, None, targets, reduction="none").loss
        assert loss.isnan().tolist() == [False, True]


def test_twin_by_its_name():
    leaves, targets = make_inputs(7, 40, 8, torch.float32)
    settings = dict(ignore_index=3, label_smoothing=0.1, z_loss=0.01, reduction="sum", num_classes=39)
    targets = targets.clamp(0, 38)
    ours = linear_cross_entropy_torch(*leaves, targets, **settings)
    theirs = linear_cross_entropy(*leaves, targets, impl="torch", **settings)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs))
    assert ours.num_targets.item() == (targets != 3).sum().item()


def make_head(hidden_size=16, vocab_size=40, **settings):
    torch.manual_seed(0)
    head = MaskedLMHead(hidden_size, vocab_size, **settings)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head, torch.randn(vocab_size, hidden_size, requires_grad=True)


def test_head_equals_hugging_faces():
    transformers = pytest.importorskip("transformers")
    from transformers.models.roberta.modeling_roberta import RobertaLMHead

    head, decoder = make_head()
    theirs = RobertaLMHead(transformers.RobertaConfig(hidden_size=16, vocab_size=40, layer_norm_eps=1e-5))
    theirs.decoder.bias = theirs.bias
    tied = {"decoder.weight": decoder.detach(), "decoder.bias": head.bias.detach()}
    theirs.load_state_dict({**head.state_dict(), **tied})
    hidden = torch.randn(3, 5, 16)
    torch.testing.assert_close(head.logits(hidden, decoder), theirs(hidden), rtol=1e-4, atol=1e-4)
    tanh, decoder = make_head(hidden_act="gelu_new")
    assert not torch.allclose(tanh.logits(hidden, decoder), theirs(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_head_sees_masked_rows_only(impl, device):
    head, decoder = make_head()
    head, decoder = head.to(device), decoder.detach().to(device).requires_grad_()
    hidden = torch.randn(2, 6, 16, device=device, requires_grad=True)
    positions = torch.tensor([[4, 0, 0], [1, 2, 5]], device=device)
    labels = torch.tensor([[7, 3, -100], [0, -100, 38]], device=device)
    output = head(hidden, decoder, labels, positions, num_classes=39, impl=impl)
    output.loss.backward()
    gradients = [hidden.grad, decoder.grad, *(parameter.grad for parameter in head.parameters())]

    for leaf in (hidden, decoder, *head.parameters()):
        leaf.grad = None
    every_label = torch.full((2, 6), -100, device=device)
    for sequence, position, label in [(0, 4, 7), (0, 0, 3), (1, 1, 0), (1, 5, 38)]:
        every_label[sequence, position] = label
    logits = head.logits(hidden, decoder, num_classes=39, impl="torch")
    expected = F.cross_entropy(logits.flatten(0, 1), every_label.flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    assert output.num_targets.item() == 4
    for mine, leaf in zip(gradients, (hidden, decoder, *head.parameters())):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-4)

    rows = hidden[torch.arange(2, device=device)[:, None], positions]
    for gathered in (rows, rows.flatten(0, 1)):
        again = head(gathered, decoder, labels.flatten() if gathered.dim() == 2 else labels, num_classes=39, impl=impl)
        torch.testing.assert_close(again.loss, output.loss)


def test_head_keeps_fp32_parameters_with_bf16_hidden_states():
    head, decoder = make_head()
    hidden = torch.randn(5, 16).bfloat16().requires_grad_()
    head(hidden, decoder, torch.arange(5)).loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in (decoder, *head.parameters()))


def test_head_refuses_what_does_not_fit():
    head, decoder = make_head()
    with pytest.raises(ValueError, match="hidden_act='relu' is unknown"):
        MaskedLMHead(4, 5, hidden_act="relu")
    with pytest.raises(ValueError, match="do not match"):
        head(torch.zeros(2, 6, 16), decoder, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-4)])
@pytest.mark.parametrize("num_entries, num_classes", [(50304, 50265), (50304, 50304), (30522, 30522)])
def test_gpu_real_sizes(dtype, label_smoothing, z_loss, num_entries, num_classes):
    inputs = make_inputs(1300, num_entries, 768, dtype, "cuda", num_classes, parameter_dtype=torch.float32)
    for reduction in ("mean", "none"):
        check_against_torch(*inputs, "triton", reduction, label_smoothing, z_loss, num_classes)


@pytest.mark.gpu
def test_gpu_hundred_backwards_are_the_same_bits():
    leaves, targets = make_inputs(2500, 50304, 768, torch.bfloat16, "cuda", 50265)
    expected = None
    for _ in range(100):
        output = linear_cross_entropy(*leaves, targets, num_classes=50265)
        gradients = torch.autograd.grad(output.loss, leaves)
        expected = expected or gradients
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [4928, 9856])
def test_gpu_peak_memory_is_a_quarter_of_the_logits(num_rows):
    (hidden, weight, bias), targets = make_inputs(num_rows, 50304, 768, torch.bfloat16, "cuda", 50265)
    weight = weight.detach().requires_grad_()
    for measured in (False, True):  # the first run warms up cuBLAS, whose workspace stays
        for leaf in (hidden, weight, bias):
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, bias, targets, reduction="sum", num_classes=50265).loss.backward()
        extra = torch.cuda.max_memory_allocated() - before - weight.numel() * 4
        if measured:
            assert extra <= num_rows * 50304 * 2 / 4, f"{extra / 2**20:.0f} MiB"


@pytest.mark.gpu
def test_gpu_graph_capture_and_compile():
    leaves, targets = make_inputs(1300, 50304, 64, torch.bfloat16, "cuda", 50265)

    def step(*leaves):
        output = linear_cross_entropy(*leaves, targets, num_classes=50265)
        return output.loss, output.num_correct

    loss, num_correct = step(*leaves)
    expected = [loss, num_correct, *torch.autograd.grad(loss, leaves)]
    loss, num_correct = torch.compile(step, fullgraph=True)(*leaves)
    compiled = [loss, num_correct, *torch.autograd.grad(loss, leaves)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails where the host asks the device for a number
        loss, num_correct = step(*leaves)
        captured = [loss, num_correct, *torch.autograd.grad(loss, leaves)]
    graph.replay()
    torch.cuda.synchronize()
    for one, two, three in zip(expected, compiled, captured):
        # Inductor divides by the number of targets by an approximate instruction.
        torch.testing.assert_close(two, one)
        assert torch.equal(one, three)


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_gpu_more_than_two_to_the_31_logits_in_a_chunk():
    (hidden, weight, bias), targets = make_inputs(20480, 600_000, 16, torch.bfloat16, "cuda")
    assert cross_entropy._chunk_rows(20480) * 600_000 > 2**31
    loss = linear_cross_entropy(hidden, weight, bias, targets, reduction="none").loss
    for rows in (slice(0, 8), slice(4088, 4096), slice(20472, 20480)):
        expected = F.cross_entropy(F.linear(hidden[rows], weight, bias).float(), targets[rows], reduction="none")
        torch.testing.assert_close(loss[rows], expected, rtol=1e-4, atol=1e-4)
