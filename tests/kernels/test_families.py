"""Every family of encoders with the kernels inside: the same loss, gradients, logits and hidden states as before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from encoders import KINDS, MODELS, assert_close, make_batch, make_model, only, run
from fastroberta_kernels import huggingface

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in MODELS if name not in ("roberta", "bert")]  # which test_huggingface.py takes in detail
every_other = pytest.mark.parametrize("name", OTHERS)
# How many modules of a model with two layers are replaced; those of BERT where nothing is said.
COUNTS = {
    "mpnet": {"attention": 0},
    "esm": {"layer_norm": 0, "embedding": 0},
    "distilbert": {"layer_norm": 2},
}
LEFT_ALONE = {"mpnet": {"attention": 2}, "esm": {"layer_norm": 4, "embedding": 1}}


def expected_counts(name: str, kinds=KINDS) -> dict[str, int]:
    counts = {"attention": 2, "layer_norm": 4, "gelu": 2, "embedding": 1, "mlm_head": 1, **COUNTS.get(name, {})}
    return {kind: counts[kind] for kind in kinds}


@pytest.mark.parametrize("kinds", [*[(kind,) for kind in KINDS], KINDS], ids="+".join)
@every_other
def test_loss_and_gradients_stay_the_same(name, kinds):
    model = make_model(name)
    for padding in ("none", "right", "anywhere") if kinds == KINDS else ("right",):
        batch = make_batch(model, padding)
        expected = run(model, batch)
        applied = huggingface.apply(model, **only(*kinds))
        assert applied.replaced == expected_counts(name, kinds)
        left_alone = {kind: number for (kind, _), number in applied.left_alone.items()}
        assert left_alone == {k: number for k, number in LEFT_ALONE.get(name, {}).items() if k in kinds}
        assert_close(run(model, batch), expected, 1e-5)
        applied.revert()


@every_other
def test_evaluation_gives_logits_loss_and_hidden_states(name):
    model = make_model(name).eval()
    batch = make_batch(model)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        huggingface.apply(model)
        found = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-5, atol=2e-5)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for ours, theirs in zip(found.hidden_states, expected.hidden_states):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=2e-5)


@every_other
def test_other_inputs_and_ways_to_call(name):
    model = make_model(name)
    batch = make_batch(model)
    shape = batch["input_ids"].shape
    batches = [batch | {"position_ids": torch.arange(shape[1]).flip(0).expand(shape) + 3}]
    without_ids = {key: value for key, value in batch.items() if key != "input_ids"}
    batches.append(without_ids | {"inputs_embeds": torch.randn(*shape, model.get_input_embeddings().embedding_dim)})
    expected = [run(model, each) for each in batches]
    as_tuple = model(**batch, return_dict=False)[0]
    applied = huggingface.apply(model)
    for each, results in zip(batches, expected):
        assert_close(run(model, each), results, 1e-5)
    (loss,) = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, as_tuple, rtol=1e-5, atol=0)
    assert model(**batch, num_items_in_batch=7).logits is None
    applied.revert()


@every_other
def test_attention_weights_on_request(name):
    model = make_model(name, attn_implementation="eager").eval()
    batch = make_batch(model)
    expected = model(**batch, output_attentions=True)
    huggingface.apply(model)
    found = model(**batch, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) == 2
    for ours, theirs in zip(found.attentions, expected.attentions):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@every_other
def test_dropout_acts_at_every_site_and_repeats_when_checkpointed(name, monkeypatch):
    """A site that is forgotten would show in the number of seeds, or as a difference from the checkpointed run."""
    model = make_model(name, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch = make_batch(model)
    huggingface.apply(model)
    seeds, draw = [], torch.randint
    with monkeypatch.context() as patches:
        patches.setattr(torch, "randint", lambda *args, **kw: seeds.append(args) or draw(*args, **kw))
        torch.manual_seed(7)
        expected = run(model, batch)
    # DistilBERT drops nothing after attention, and ESM not in its embeddings.
    assert len(seeds) == {"distilbert": 1 + 2 * 2, "mpnet": 1 + 2 * 2, "esm": 2}.get(name, 1 + 2 * 3)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        assert_close(run(model, batch), expected, 1e-6)


def test_the_discriminator_of_electra():
    model = make_model("electra", "ForPreTraining")
    batch = make_batch(model)
    batch["labels"] = (batch["labels"] != -100).long()
    expected = run(model, batch)
    applied = huggingface.apply(model)
    assert applied.replaced == {"attention": 2, "layer_norm": 4, "gelu": 3, "embedding": 1, "mlm_head": 0}
    assert_close(run(model, batch), expected, 1e-5)


def test_what_distilbert_takes_otherwise():
    """Its layer passes by its MLP, and its head by its own loss function: changes of both are noticed."""
    model = make_model("distilbert")
    batch = make_batch(model)
    huggingface.apply(model)
    model.mlm_loss_fct = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    ffn = model.distilbert.transformer.layer[0].ffn
    ffn.register_forward_hook(scale)
    found = run(model, batch)
    reference = make_model("distilbert")
    reference.mlm_loss_fct = model.mlm_loss_fct
    reference.distilbert.transformer.layer[0].ffn.register_forward_hook(scale)
    assert_close(found, run(reference, batch), 1e-5)


def scale(module, inputs, output):
    return output * 1.5


@pytest.mark.parametrize("name", MODELS)
def test_applied_twice_is_applied_once(name):
    model = make_model(name)
    batch = make_batch(model)
    classes = [type(module) for module in model.modules()]
    expected = run(model, batch)
    first = huggingface.apply(model)
    applied_classes = [type(module) for module in model.modules()]
    second = huggingface.apply(model)
    assert not any(second.replaced.values())
    replaced_before = {kind: n for (kind, reason), n in second.left_alone.items() if reason == "replaced before"}
    assert replaced_before == {kind: number for kind, number in first.replaced.items() if number}
    assert [type(module) for module in model.modules()] == applied_classes
    first.revert()
    second.revert()
    assert [type(module) for module in model.modules()] == classes
    again = run(model, batch)
    assert torch.equal(again[0], expected[0])


# ---- other versions of transformers ----------------------------------------------------------------------------------


def test_the_tested_version_is_the_pinned_one():
    assert f"transformers=={huggingface.TESTED}" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("name", MODELS)
def test_another_version_with_the_same_internals_gets_the_kernels(name, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    state = torch.get_rng_state()
    model = make_model(name)
    torch.set_rng_state(state)
    applied = huggingface.apply(model)
    assert applied.replaced == expected_counts(name)
    assert torch.equal(torch.get_rng_state(), state), "the trial must not draw from the caller's generator"


def test_parts_that_another_version_changed_are_left_alone(monkeypatch):
    from transformers.models.bert import modeling_bert

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states)) * 0.9

    monkeypatch.setattr("transformers.__version__", "5.99.0")
    monkeypatch.setattr(modeling_bert.BertIntermediate, "forward", forward)
    attention = modeling_bert.BertSelfAttention
    renamed = {"__new__": lambda cls, *args, **kwargs: attention(*args, **kwargs), "forward": None}
    monkeypatch.setattr(modeling_bert, "BertSelfAttention", type("BertSelfAttention", (), renamed))
    model = make_model("bert")
    batch = make_batch(model)
    expected = run(model, batch)
    applied = huggingface.apply(model)
    reason = f"transformers 5.99.0 computes it differently from {huggingface.TESTED}, the version tested"
    lines = str(applied).splitlines()
    assert f"  gelu: 0 replaced; 2 left alone: {reason}" in lines
    assert f"  attention: 0 replaced; {reason}" in lines
    assert applied.replaced["layer_norm"] == 4 and applied.replaced["mlm_head"] == 1
    assert_close(run(model, batch), expected, 1e-5)


# ---- the table of README.md ------------------------------------------------------------------------------------------


def test_the_table_of_models_is_true():
    readme = (ROOT / "kernels" / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", readme, re.MULTILINE)
    header = next(row for row in rows if row[0] == "model")
    table = {model: dict(zip(header[1:], cells)) for model, *cells in rows}
    names = {family.name: family for family in huggingface.FAMILIES}
    for name, family in names.items():
        kinds = {part.kind for part in family.parts.values() if part.replaces}
        row = next(row for models, row in table.items() if name in models.split(", "))
        assert {kind for kind, cell in row.items() if cell.startswith("yes")} == kinds, name
