"""The model is RoBERTa: held against transformers' RobertaForMaskedLM with the same weights."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from fastroberta_kernels.masking import mask_tokens

from fastroberta.config import ModelConfig
from fastroberta.hf import load_huggingface
from fastroberta.model import AttentionScope, RobertaForMaskedLM

transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=307, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=66, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
SPECIAL = (0, 1, 2, 3, 306)


def make_huggingface(**sizes):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**{**SMALL, "type_vocab_size": 1, **sizes})
    model = transformers.RobertaForMaskedLM(config).eval()
    with torch.no_grad():  # zero biases and unit norms would hide a parameter that is not used
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.roberta.embeddings.word_embeddings.weight[1] = 0
        model.roberta.embeddings.position_embeddings.weight[1] = 0
    return model


@pytest.fixture
def pair(tmp_path):
    theirs = make_huggingface()
    theirs.save_pretrained(tmp_path)
    return theirs, load_huggingface(tmp_path)


def make_batch(size_b=4, size_l=32, first_sample=0):
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(4, 306, (64, size_l), generator=generator)[first_sample : first_sample + size_b]
    clean[:, 0] = 0
    # Unequal numbers of maskable tokens, so that sequences have unequal numbers of masked ones.
    for row in range(size_b):
        clean[row, 5 : 5 + (first_sample + row) % 12] = 2
    ids = torch.arange(first_sample, first_sample + size_b)
    return mask_tokens(
        clean, mask_token_id=306, vocab_size=307, special_token_ids=SPECIAL, mlm_probability=0.3, seed=5, sample_ids=ids
    )


def full_labels(batch):
    labels = torch.full_like(batch.input_ids, -100)
    for row in range(len(labels)):
        used = batch.labels[row] != -100
        labels[row, batch.positions[row][used]] = batch.labels[row][used]
    return labels


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()


def stack_gradients(theirs, ours, name):
    """Their gradient under our name and in our shape."""
    named = {key: value.grad for key, value in theirs.named_parameters()}
    from fastroberta.hf import copy_from_huggingface

    target = {key: torch.zeros_like(value) for key, value in ours.named_parameters()}
    copy_from_huggingface(named, target, ours.config, "gradients")
    return target[name]


@pytest.mark.parametrize("size", ["small", "base"])
def test_logits_equal_transformers(size, tmp_path):
    sizes = {} if size == "small" else dict(
        vocab_size=50265, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=514,
    )  # fmt: skip
    theirs = make_huggingface(**sizes)
    theirs.save_pretrained(tmp_path)
    ours = load_huggingface(tmp_path)
    input_ids = torch.randint(4, sizes.get("vocab_size", 307) - 1, (2, 24))
    with torch.no_grad():
        assert (ours(input_ids) - theirs(input_ids).logits).abs().max() < 1e-5


def test_logits_with_padding_anywhere(pair):
    theirs, ours = pair
    input_ids = torch.randint(4, 306, (3, 20))
    mask = torch.ones_like(input_ids)
    mask[0, 13:] = 0  # on the right
    mask[1, :6] = 0  # on the left
    mask[2, 7:9] = 0  # in the middle
    input_ids[mask == 0] = 1
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask).logits
        assert (ours(input_ids, mask) - expected)[mask.bool()].abs().max() < 1e-5


def test_loss_and_every_gradient_equal_transformers(pair):
    theirs, ours = pair
    batch = make_batch()
    expected = theirs(batch.input_ids, labels=full_labels(batch)).loss
    expected.backward()
    result = ours.loss(*batch)
    (result.loss / result.num_targets).backward()
    assert relative(result.loss / result.num_targets, expected) < 1e-5
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, stack_gradients(theirs, ours, name)) < 1e-5, name


def test_masked_rows_only_changes_neither_loss_nor_gradients(pair):
    _, ours = pair
    batch = make_batch()
    ours.loss(*batch).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    # The whole last layer and the head on all tokens.
    logits = ours(batch.input_ids)
    loss = F.cross_entropy(logits.flatten(0, 1), full_labels(batch).flatten(), reduction="sum")
    loss.backward()
    assert relative(ours.loss(*batch).loss, loss) < 1e-6
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-5, name


def test_hundred_adamw_steps_give_transformers_losses(pair):
    theirs, ours = pair
    options = dict(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), **options)
    our_optimizer = torch.optim.AdamW(ours.parameters(), **options)
    for step in range(100):
        batch = make_batch(first_sample=step % 10 * 4)
        expected = theirs(batch.input_ids, labels=full_labels(batch)).loss
        result = ours.loss(*batch)
        loss = result.loss / result.num_targets
        assert abs(loss.item() - expected.item()) < 1e-4, step
        for optimizer, value in ((their_optimizer, expected), (our_optimizer, loss)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert loss.item() < 5.0  # it did learn something: it began at ln(307) = 5.73


def test_counts_of_correct_and_masked_tokens(pair):
    theirs, ours = pair
    batch = make_batch()
    labels = full_labels(batch)
    with torch.no_grad():
        predicted = theirs(batch.input_ids).logits.argmax(-1)
        result = ours.loss(*batch)
    assert result.num_correct == (predicted == labels).sum()
    assert result.num_targets == (labels != -100).sum()


def make_model(**sizes):
    model = RobertaForMaskedLM(ModelConfig(**{**SMALL, **sizes}))
    model.init_weights(1)
    return model


def test_padding_changes_nothing():
    model = make_model()
    batch = make_batch(2, 24)
    padded = F.pad(batch.input_ids, (0, 8), value=1)
    lengths = torch.full((2,), 24, dtype=torch.int32)
    expected = model.loss(*batch).loss
    got = model.loss(padded, batch.positions, batch.labels, AttentionScope(key_lengths=lengths)).loss
    assert relative(got, expected) < 1e-6


def test_documents_do_not_see_each_other():
    model = make_model()
    batch = make_batch(2, 24)
    bounds = torch.tensor([0, 10, 24, 30, 48, 48, 48], dtype=torch.int32)  # two documents a block, two empty ones
    scope = AttentionScope(cu_seqlens=bounds)
    loss = model.loss(*batch, scope).loss

    def hidden_of_first(ids):
        return model.encode(ids, scope)[0, :10]

    changed = batch.input_ids.clone()
    changed[0, 10:] = 77
    assert torch.equal(hidden_of_first(batch.input_ids), hidden_of_first(changed))
    # Only masked rows in the last layer, or all of them: the same loss.
    logits = model.lm_head.logits(model.encode(batch.input_ids, scope), model.embeddings.word_embeddings.weight, 307)
    expected = F.cross_entropy(logits.flatten(0, 1).float(), full_labels(batch).flatten(), reduction="sum")
    assert relative(loss, expected) < 1e-6
    whole = torch.tensor([0, 24, 48], dtype=torch.int32)
    assert relative(model.loss(*batch, AttentionScope(cu_seqlens=whole)).loss, model.loss(*batch).loss) < 1e-6


def bounds_of(scope, size):
    return torch.arange(0, size * 24 + 1, 12, dtype=torch.int32) if scope == "document" else None


@pytest.mark.parametrize("site", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_training_with_dropout_needs_keys(site):
    with pytest.raises(ValueError, match=r"needs dropout_keys and first_sample; pass both, or call eval\(\)"):
        make_model(**{site: 0.1}).train().loss(*make_batch())


@pytest.mark.parametrize("scope", ["block", "document"])
def test_dropout_does_not_depend_on_how_the_batch_is_cut(scope):
    model = make_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    keys = model.dropout_keys(3, torch.device("cpu"))

    def loss(size, first):
        batch = make_batch(size, 24, first)
        return model.loss(
            *batch, AttentionScope(cu_seqlens=bounds_of(scope, size)), keys, torch.tensor(first + 100)
        ).loss

    whole = loss(6, 0)
    parts = loss(2, 0) + loss(3, 2) + loss(1, 5)
    assert relative(parts, whole) < 1e-6
    model.eval()  # dropout did something, and only in training mode
    assert relative(whole, model.loss(*make_batch(6, 24)).loss) > 1e-3
    assert torch.equal(loss(6, 0), model.loss(*make_batch(6, 24), AttentionScope(cu_seqlens=bounds_of(scope, 6))).loss)


@pytest.mark.parametrize("sizes", [(16,), (4,) * 4, (1,) * 16], ids=["1x16", "4x4", "16x1"])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(sizes):
    model = make_model()
    result = model.loss(*make_batch(16))
    (result.loss / result.num_targets).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    first = 0
    for size in sizes:
        part = model.loss(*make_batch(size, first_sample=first))
        (part.loss / result.num_targets).backward()
        first += size
    got = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (got - expected).abs().max() < 1e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_gradient_checkpointing_recomputes_the_same_dropout(precision):
    model = make_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    model.set_precision(precision)
    keys, first = model.dropout_keys(3, torch.device("cpu")), torch.tensor(7)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.loss(*make_batch(), AttentionScope(), keys, first).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("precision", "compiled"), [("bf16", False), ("bf16", True), ("fp8", False), ("fp8", True)])
def test_weights_cast_once_give_the_same_bits(precision, compiled):
    """Losses and gradients of two micro-batches; a change of the weights after the block is seen."""
    model = make_model(hidden_dropout_prob=0.1).train()
    model.set_precision(precision)
    loss = torch.compile(model.loss, backend="aot_eager") if compiled else model.loss
    keys = model.dropout_keys(1, torch.device("cpu"))

    def run(context):
        model.zero_grad()
        with context:
            losses = []
            for first in (0, 4):
                losses.append(loss(*make_batch(first_sample=first), AttentionScope(), keys, torch.tensor(first)).loss)
                losses[-1].backward()
        return torch.stack(losses), [parameter.grad.clone() for parameter in model.parameters()]

    for _ in range(2):
        (once, gradients), (at_each_use, others) = run(model.cast_once()), run(contextlib.nullcontext())
        assert torch.equal(once, at_each_use)
        assert all(map(torch.equal, gradients, others))
        with torch.no_grad():
            model.layer[0].output.weight.add_(0.5)
    with pytest.raises(KeyError), model.cast_once():
        assert model.layer[0].casts[0].dtype == torch.bfloat16
        raise KeyError
    assert model.layer[0].casts is None


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 5e-3), ("fp8", 1e-2)])
def test_lower_precision_is_close_to_fp32(precision, bound):
    model = make_model()
    batch = make_batch()
    losses, gradients = [], []
    for one in ("fp32", precision):
        model.set_precision(one)
        model.zero_grad()
        losses.append(model.loss(*batch).loss)
        losses[-1].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative(losses[1], losses[0]) < bound
    cosine = F.cosine_similarity(*gradients, dim=0)
    assert 1 - 10 * bound < cosine < 1 - 1e-6
    if precision == "fp8":  # another model than bf16's, forward and backward
        model.set_precision("bf16")
        assert model.loss(*batch).loss != losses[1]


def test_initial_weights():
    model = make_model()
    words = model.embeddings.word_embeddings.weight
    assert words.shape[0] == 320 and not words[307:].any() and not words[1].any()
    assert abs(words[4:307].std().item() - 0.02) < 1e-3
    assert not model.layer[0].intermediate.bias.any() and (model.layer[0].output_norm.weight == 1).all()
    again = make_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
