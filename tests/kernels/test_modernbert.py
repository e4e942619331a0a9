"""The kernels inside transformers' ModernBERT: the same losses and gradients as before, and a way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from encoders import assert_close, only, run
from fastroberta_kernels import _hf_attention, _masked_lm, _modernbert, huggingface
from test_huggingface import exchange
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertForSequenceClassification, ModernBertModel

KINDS = ("attention", "layer_norm", "gelu", "mlm_head")
COUNTS = {"attention": 3, "layer_norm": 3, "gelu": 3, "embedding": 0, "mlm_head": 1}
VOCABULARY, LENGTH = 97, 17


def make_model(model_class=ModernBertForMaskedLM, **settings):
    """A global layer and two local ones, in which a token sees four others to each side."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "local_attention": 8,
            "initializer_range": 0.2,  # with small weights attention would be flat, and an error in it invisible
            "initializer_cutoff_factor": 3.0,
            **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
            **settings,
        }
    )
    model = model_class(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def make_batch(padding="right", device="cpu"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 11:] = 0
        mask[2, 1:] = 0
    elif padding == "anywhere":
        mask[0, :5] = 0
        mask[1, 3:6] = 0
    ids[mask == 0] = 0
    labels = torch.where((torch.rand(ids.shape, generator=generator) < 0.3) & (mask == 1), ids, -100)
    batch = {"input_ids": ids, "labels": labels}
    if padding != "none":
        batch["attention_mask"] = mask
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.mark.parametrize("padding", ["none", "right", "anywhere"])
@pytest.mark.parametrize("kinds", [*[(kind,) for kind in KINDS], KINDS], ids="+".join)
def test_loss_and_gradients_stay_the_same(kinds, padding):
    model, batch = make_model(), make_batch(padding)
    expected = run(model, batch)
    applied = huggingface.apply(model, **only(*kinds))
    assert applied.replaced == {kind: COUNTS[kind] for kind in kinds} and not applied.left_alone
    assert_close(run(model, batch), expected, 1e-5)


def test_biases_everywhere_and_the_tanh_form():
    biases = {f"{name}_bias": True for name in ("norm", "attention", "mlp", "classifier")}
    model = make_model(**biases, hidden_activation="gelu_new", classifier_activation="gelu_pytorch_tanh")
    batch = make_batch()
    expected = run(model, batch)
    assert huggingface.apply(model).replaced == COUNTS
    assert_close(run(model, batch), expected, 1e-5)


@pytest.mark.parametrize("padding, windows", [("none", 2), ("right", 2), ("anywhere", 0)])
def test_each_kind_really_runs_its_kernel(padding, windows, monkeypatch):
    """Equal results would also come from a model that was left as it was. Local layers need tokens in their places."""
    calls = {}
    places = {
        "attention": [_hf_attention], "apply_rotary": [_modernbert], "layer_norm": [_modernbert, _masked_lm],
        "geglu": [_modernbert], "linear_cross_entropy": [_masked_lm],
    }  # fmt: skip
    for name, modules in places.items():
        operation, calls[name] = getattr(modules[0], name), []

        def record(*args, operation=operation, name=name, **kwargs):
            calls[name].append(kwargs)
            return operation(*args, **kwargs)

        for module in modules:
            monkeypatch.setattr(module, name, record)
    model = make_model()
    huggingface.apply(model, impl="torch")
    run(model, make_batch(padding))
    assert all(call["impl"] == "torch" for made in calls.values() for call in made)
    numbers = {name: len(made) for name, made in calls.items()}
    attended = {"attention": 1 + windows, "apply_rotary": 1 + windows}
    assert numbers == {**attended, "layer_norm": 2 + 2 + 1 + 1, "geglu": 3, "linear_cross_entropy": 1}
    assert [call["window_size"] for call in calls["attention"]] == [(-1, -1), *[(4, 4)] * windows]


def test_evaluation_gives_logits_and_hidden_states():
    model, batch = make_model().eval(), make_batch()
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        huggingface.apply(model)
        found = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    for ours, theirs in zip(
        (found.logits, *found.hidden_states), (expected.logits, *expected.hidden_states), strict=True
    ):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_revert_restores_everything():
    model, batch = make_model(), make_batch()
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    loss, gradients = run(model, batch)
    applied = huggingface.apply(model)
    assert model.config._attn_implementation.startswith("fastroberta_kernels")
    assert model(**batch).logits is None
    again = huggingface.apply(model)
    assert again.left_alone == {(kind, "replaced before"): COUNTS[kind] for kind in KINDS}
    applied.revert()
    again.revert()
    assert model.config._attn_implementation == "sdpa"
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == parameters
    loss_again, gradients_again = run(model, batch)
    assert torch.equal(loss_again, loss)
    assert all(torch.equal(gradients_again[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("arguments", ["4-D mask", "positions", "embeddings", "num_items_in_batch", "longer"])
def test_other_ways_to_call(arguments):
    model, batch = make_model(), make_batch()
    if arguments == "4-D mask":
        allowed = (torch.rand(3, 1, LENGTH, LENGTH) < 0.7) | torch.eye(LENGTH, dtype=torch.bool)
        batch["attention_mask"] = allowed
    elif arguments == "positions":
        batch["position_ids"] = torch.arange(LENGTH).flip(0).expand(3, -1) * 2
    elif arguments == "embeddings":
        batch["inputs_embeds"] = torch.randn(3, LENGTH, 32)
        del batch["input_ids"]
    elif arguments == "num_items_in_batch":
        batch["num_items_in_batch"] = 50
    else:
        batch["input_ids"], batch["labels"] = (batch[name].repeat(1, 10) for name in ("input_ids", "labels"))
        del batch["attention_mask"]
    expected = run(model, batch)
    huggingface.apply(model)
    assert_close(run(model, batch), expected, 1e-5)


def test_attention_weights_on_request():
    model, batch = make_model(attn_implementation="eager").eval(), make_batch()
    expected = model(**batch, output_attentions=True)
    huggingface.apply(model)
    found = model(**batch, output_attentions=True)
    assert len(found.attentions) == 3
    for ours, theirs in zip(found.attentions, expected.attentions):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_packed_documents():
    """Bounds given as for transformers' flash attention: as if every document were a batch of its own."""
    model = make_model().eval()
    documents = [torch.randint(1, VOCABULARY, (1, length)) for length in (12, 1, 9)]
    expected = torch.cat([model(document).logits for document in documents], 1)
    huggingface.apply(model)
    bounds = torch.tensor([0, 12, 13, 22])
    found = model(
        torch.cat(documents, 1), position_ids=torch.cat([torch.arange(d.shape[1]) for d in documents])[None],
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=12, max_length_k=12,
    ).logits  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_dropout(use_reentrant):
    model, batch = make_model(attention_dropout=0.1, mlp_dropout=0.1), make_batch()
    huggingface.apply(model)
    torch.manual_seed(7)
    expected = run(model, batch)
    assert not torch.equal(run(model, batch)[0], expected[0]), "dropout must be drawn anew"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.manual_seed(7)
    assert_close(run(model, batch), expected, 1e-6)


CHANGES = {
    "a projection": lambda model: exchange(model.model.layers[1].attn, "Wqkv"),
    "a layer in the MLP": lambda model: exchange(model.model.layers[1].mlp, "Wi"),
    "the head's layer": lambda model: exchange(model.head, "dense"),
    "an activation": lambda model: setattr(model.model.layers[1].mlp, "act", nn.Tanh()),
    "a hook on a norm": lambda model: model.model.layers[1].mlp_norm.register_forward_hook(
        lambda module, inputs, output: output * 1.5
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_are_changed_later_keep_working(change):
    model, reference, batch = make_model(), make_model(), make_batch()
    huggingface.apply(model)
    for changed in (model, reference):
        torch.manual_seed(1)
        CHANGES[change](changed)
    assert_close(run(model, batch), run(reference, batch), 1e-5)


def test_what_is_left_alone_is_named():
    model = make_model(hidden_activation="relu", classifier_activation="silu", sparse_pred_ignore_index=-1)
    assert str(huggingface.apply(model)) == (
        "ModernBertForMaskedLM with fastroberta_kernels:\n"
        "  attention: 3 replaced\n"
        "  layer_norm: 3 replaced\n"
        "  gelu: 0 replaced; 3 left alone: its activation ReLU is not GELU\n"
        "  embedding: 0 replaced; this model has none\n"
        "  mlm_head: 0 replaced; 1 left alone: the activation of its head is not GELU"
    )
    model = make_model(sparse_pred_ignore_index=-1)
    assert ("mlm_head", "its labels are ignored at -1, not -100") in huggingface.apply(model).left_alone
    model = make_model(ModernBertModel, hidden_size=320)
    assert ("attention", "heads of 160 exceed the kernel's 128") in huggingface.apply(model).left_alone


def test_sequence_classification():
    model, batch = make_model(ModernBertForSequenceClassification, num_labels=3), make_batch()
    batch["labels"] = torch.tensor([0, 2, 1])
    expected = run(model, batch)
    assert huggingface.apply(model).replaced == {**COUNTS, "mlm_head": 0}
    assert_close(run(model, batch), expected, 1e-5)


@pytest.mark.parametrize("padding", [pytest.param("none", marks=pytest.mark.slow(reason="5 seconds")), "right"])
def test_compiled_as_one_graph(padding):
    model, batch = make_model(num_hidden_layers=2), make_batch(padding)
    huggingface.apply(model)
    expected = run(model, batch)
    torch._dynamo.reset()
    found = run(torch.compile(model, fullgraph=True, backend="aot_eager"), batch)
    found = found[0], {key.removeprefix("_orig_mod."): gradient for key, gradient in found[1].items()}
    assert_close(found, expected, 1e-5)


def test_the_triton_kernels_compute_the_same(device):
    """On a CPU in Triton's interpreter, hence the tiny model; dropout too, since the twins draw the same bits."""
    model = make_model(
        num_hidden_layers=2, hidden_size=16, intermediate_size=8, vocab_size=20, attention_dropout=0.1,
        global_attn_every_n_layers=2, local_attention=4,
    ).to(device)  # fmt: skip
    ids = torch.randint(1, 20, (2, 9), device=device)
    mask = (torch.arange(9, device=device) < torch.tensor([[6], [9]], device=device)).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(ids < 7, ids, -100)}
    results = []
    for impl in ("torch", "triton"):
        applied = huggingface.apply(model, impl=impl)
        assert applied.replaced["attention"] == 2
        torch.manual_seed(7)
        results.append(run(model, batch))
        applied.revert()
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "right", "anywhere"])
def test_on_a_gpu_loss_and_gradients_stay_the_same(padding):
    model, batch = make_model(hidden_size=128).cuda(), make_batch(padding, "cuda")
    expected = run(model, batch)
    huggingface.apply(model)
    assert_close(run(model, batch), expected, 1e-4)
