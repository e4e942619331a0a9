"""The kernels inside transformers' models: the same losses, gradients, names and files as before, and a way back."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from encoders import KINDS, VOCABULARY, assert_close, make_batch, make_config, make_model, only, run
from fastroberta_kernels import huggingface
from fastroberta_kernels._hf_attention import describe_padding
from transformers import BertConfig, BertModel, RobertaConfig, RobertaForCausalLM, RobertaForMaskedLM

MASKED_LM = ("roberta", "bert")


def layer(model) -> nn.Module:
    return model.roberta.encoder.layer[0]


@pytest.mark.parametrize("padding", ["none", "right", "anywhere"])
@pytest.mark.parametrize("kinds", [*[(kind,) for kind in KINDS], KINDS], ids="+".join)
@pytest.mark.parametrize("name", MASKED_LM)
def test_loss_and_gradients_stay_the_same(name, kinds, padding):
    model = make_model(name)
    batch = make_batch(model, padding)
    expected = run(model, batch)
    applied = huggingface.apply(model, **only(*kinds))
    counts = {"attention": 2, "layer_norm": 4, "gelu": 2, "embedding": 1, "mlm_head": 1}
    assert applied.replaced == {kind: counts[kind] for kind in kinds} and not applied.left_alone
    assert_close(run(model, batch), expected, 1e-5)


def test_each_kind_really_runs_its_kernel(device):
    """Equal results would also come from a model that was left as it was."""
    model = make_tiny(device)
    huggingface.apply(model, impl="triton")
    calls = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            calls[operation.name().removeprefix("fastroberta_kernels::")] += 1
            return operation(*args, **(kwargs or {}))

    with Count():
        run(model, make_tiny_batch(device))
    counts = {"attention_forward": 1, "layer_norm_forward": 3, "bias_gelu_forward": 2, "embedding_layer_norm_forward": 1,
              "linear_cross_entropy_forward": 1}  # fmt: skip
    assert {name: calls.get(name) for name in counts} == counts


@pytest.mark.parametrize("name", MASKED_LM)
def test_only_rows_with_a_label_pass_the_head(name, monkeypatch):
    model = make_model(name)
    batch = make_batch(model)
    huggingface.apply(model)
    rows = []
    head = "lm_head.dense" if name == "roberta" else "cls.predictions.transform.dense"
    weight = model.get_parameter(f"{head}.weight")
    linear = torch.nn.functional.linear

    def spy(x, w, *bias):
        rows.extend([len(x)] if w is weight else [])
        return linear(x, w, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    assert model(**batch).logits is None
    assert rows == [int((batch["labels"] != -100).sum())]


@pytest.mark.parametrize("name", MASKED_LM)
def test_evaluation_gives_logits_loss_and_hidden_states(name):
    model = make_model(name).eval()
    batch = make_batch(model)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        huggingface.apply(model)
        state = torch.get_rng_state()
        found = model(**batch, output_hidden_states=True)
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not draw random numbers"
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for ours, theirs in zip(found.hidden_states, expected.hidden_states):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MASKED_LM)
@pytest.mark.parametrize(
    "arguments", ["token_type_ids", "position_ids", "one row of positions", "inputs_embeds", "int32"]
)
def test_other_inputs_of_the_embeddings(name, arguments):
    model = make_model(name)
    batch = make_batch(model)
    shape = batch["input_ids"].shape
    if arguments == "token_type_ids":
        batch["token_type_ids"] = (torch.arange(shape[1]) > 6).long().expand(shape)
    elif arguments == "position_ids":
        batch["position_ids"] = torch.arange(shape[1]).flip(0).expand(shape) + 3
    elif arguments == "one row of positions":
        batch["position_ids"] = torch.arange(shape[1])[None] + 5
    elif arguments == "inputs_embeds":
        batch["inputs_embeds"] = torch.randn(*shape, 32)
        del batch["input_ids"]
    else:
        batch["input_ids"] = batch["input_ids"].int()
    expected = run(model, batch)
    huggingface.apply(model)
    assert_close(run(model, batch), expected, 1e-5)


def test_revert_restores_everything():
    model = make_model()
    batch = make_batch(model)
    modules = dict(model.named_modules())
    classes = {name: type(module) for name, module in modules.items()}
    forwards = {name: module.forward.__func__ for name, module in modules.items()}
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    values = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    loss, gradients = run(model, batch)
    applied = huggingface.apply(model)
    run(model, batch)
    assert sum(type(module) is not classes[name] for name, module in modules.items()) == 8
    assert model.config._attn_implementation == "fastroberta_kernels"
    applied.revert()
    assert model.config._attn_implementation == "sdpa"
    assert dict(model.named_modules()) == modules
    for name, module in modules.items():
        assert type(module) is classes[name] and module.forward.__func__ is forwards[name]
        assert set(vars(module)) == attributes[name]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == values[name][0] and torch.equal(tensor, values[name][1])
    again, gradients_again = run(model, batch)
    assert torch.equal(again, loss)
    assert all(torch.equal(gradients_again[name], gradients[name]) for name in gradients)
    applied.revert()  # nothing more to undo
    assert type(model) is RobertaForMaskedLM


def test_parameters_and_names_stay_the_same_objects():
    model = make_model()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    huggingface.apply(model)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    run(model, make_batch(model))
    optimizer.step()  # an optimizer that was made earlier
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert [name for name in unmoved if "key.bias" not in name] == []  # whose gradient is zero


def test_save_pretrained_and_load(tmp_path):
    model = make_model().eval()
    batch = make_batch(model)
    model.save_pretrained(tmp_path / "before")
    huggingface.apply(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    loaded = RobertaForMaskedLM.from_pretrained(tmp_path / "after").eval()
    assert type(loaded) is RobertaForMaskedLM and loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=1e-5, atol=0)


def test_a_deep_copy_stands_on_its_own():
    model = make_model()
    batch = make_batch(model)
    applied = huggingface.apply(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    applied.revert()
    expected = run(model, batch)
    assert twin(**batch).logits is None, "the copy keeps the kernels"
    assert abs(run(twin, batch)[0] - expected[0]) > 0.1, "and its own parameters"
    assert_close(run(model, batch), expected, 1e-6)


def test_replicas_of_data_parallel_use_their_own_parameters():
    """torch.nn.DataParallel copies the dictionaries of modules: a bound forward in there would see the first device."""
    model = make_model()
    huggingface.apply(model)
    for module in model.modules():
        replica = module._replicate_for_data_parallel()
        assert type(replica) is type(module) and replica.forward.__self__ is replica


def test_bf16_model_is_as_exact_as_before():
    model = make_model()
    batch = make_batch(model)
    exact_loss, exact = run(model, batch)
    model.bfloat16()
    loss, before = run(model, batch)
    huggingface.apply(model)
    found_loss, found = run(model, batch)
    assert abs(found_loss - exact_loss) <= 2 * abs(loss - exact_loss) + 2**-7 * exact_loss
    assert found["roberta.encoder.layer.0.output.dense.bias"].dtype == torch.bfloat16

    def error(gradients):
        return math.sqrt(sum((gradients[name] - exact[name]).square().sum().item() for name in exact))

    assert error(found) <= 1.5 * error(before)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "layer_norm", "embedding"])
def test_dropout_has_the_strength_it_had(kind):
    """Each site alone, by what dropout does to the logits; means over many draws."""
    model = make_model(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            site = "attention" if "self" in name else "embedding" if "embeddings" in name else "layer_norm"
            module.p = 0.25 if site == kind else 0.0
    ids = make_batch(model, "none")["input_ids"].repeat(8, 1)

    def deviation(seed) -> float:
        torch.manual_seed(seed)
        with torch.no_grad():
            noisy = torch.cat([model(ids).logits for _ in range(4)])
        return (noisy.view(4, 8, 3, 17, VOCABULARY) - clean).square().mean().sqrt().item()

    model.eval()
    clean = model(ids[:3]).logits.detach()
    model.train()
    expected = deviation(1)
    huggingface.apply(model)
    found = deviation(2)
    assert expected > 0.01
    assert abs(found / expected - 1) < 0.1, (found, expected)


def test_dropout_is_drawn_anew_and_repeats_with_the_seed():
    model = make_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch = make_batch(model)
    huggingface.apply(model)
    torch.manual_seed(7)
    first, gradients = run(model, batch)
    second, _ = run(model, batch)
    torch.manual_seed(7)
    third, gradients_again = run(model, batch)
    assert first != second
    assert torch.equal(first, third)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_every_site_draws_its_own_seed(monkeypatch):
    model = make_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch = make_batch(model)
    seeds = []
    draw = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kw: seeds.append(draw(*args, **kw)) or seeds[-1])
    huggingface.apply(model)
    run(model, batch)
    assert len(seeds) == 1 + 2 * 3
    assert len({tuple(seed.tolist()) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_dropout(use_reentrant):
    model = make_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch = make_batch(model, "anywhere")
    huggingface.apply(model)
    torch.manual_seed(7)
    expected = run(model, batch)
    calls = []
    layer(model).output.dense.weight.register_hook(lambda gradient: calls.append(layer(model).gradient_checkpointing))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    torch.manual_seed(7)
    assert_close(run(model, batch), expected, 1e-6)
    assert calls == [True]


def test_checkpointing_with_frozen_embeddings():
    """As when adapters are trained: re-entrant checkpoints give no gradients where no input has one."""
    model = make_model()
    batch = make_batch(model)
    for parameter in (*model.roberta.embeddings.parameters(), model.lm_head.decoder.weight):
        parameter.requires_grad_(False)
    expected = run(model, batch)
    applied = huggingface.apply(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert applied.replaced["embedding"] == 1
    assert_close(run(model, batch), expected, 1e-5)


# ---- what is left alone ----------------------------------------------------------------------------------------------


def test_report_can_be_read():
    model = make_model("bert", hidden_act="relu")
    assert str(huggingface.apply(model, embedding=False)) == (
        "BertForMaskedLM with fastroberta_kernels:\n"
        "  attention: 2 replaced\n"
        "  layer_norm: 4 replaced\n"
        "  gelu: 0 replaced; 2 left alone: its activation ReLU is not GELU\n"
        "  mlm_head: 0 replaced; 1 left alone: the activation of its head is not GELU"
    )
    report = huggingface.apply(BertModel(make_config(BertConfig, 0)))
    assert "  mlm_head: 0 replaced; this model has none" in str(report)


@pytest.mark.parametrize(
    "hidden_act",
    ["relu", "quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python"],
)
def test_activations(hidden_act):
    model = make_model("bert", hidden_act=hidden_act)
    batch = make_batch(model)
    expected = run(model, batch)
    applied = huggingface.apply(model)
    is_gelu = hidden_act not in ("relu", "quick_gelu")
    assert (applied.replaced["gelu"], applied.replaced["mlm_head"]) == ((2, 1) if is_gelu else (0, 0))
    assert_close(run(model, batch), expected, 1e-5)


def test_a_decoder_keeps_its_causal_attention():
    model = RobertaForCausalLM(make_config(RobertaConfig, 1, is_decoder=True)).train()
    batch = make_batch(model)
    expected = run(model, batch)
    applied = huggingface.apply(model)
    assert applied.replaced["attention"] == 0
    assert applied.left_alone["attention", "a decoder: its attention is causal"] == 2
    assert applied.replaced["layer_norm"] == 4
    assert_close(run(model, batch), expected, 1e-5)


def test_attention_weights_by_the_configuration():
    model = make_model(attn_implementation="eager", output_attentions=True)
    applied = huggingface.apply(model)
    assert applied.replaced["attention"] == 0 and "output_attentions" in str(applied)
    assert len(model(**make_batch(model)).attentions) == 2


def test_heads_that_are_too_large():
    applied = huggingface.apply(BertModel(make_config(BertConfig, 0, hidden_size=160, num_attention_heads=1)))
    assert applied.left_alone["attention", "heads of 160 exceed the kernel's 128"] == 2


def test_a_second_apply_adds_and_reverts_in_any_order():
    model = make_model()
    batch = make_batch(model)
    expected = run(model, batch)
    first = huggingface.apply(model, **only("gelu", "attention"))
    second = huggingface.apply(model)
    assert second.left_alone == {("gelu", "replaced before"): 2, ("attention", "replaced before"): 2}
    assert second.replaced["layer_norm"] == 4
    first.revert()
    assert_close(run(model, batch), expected, 1e-5)
    second.revert()
    assert type(model.roberta.encoder.layer[0].intermediate).__mro__[1] is nn.Module


class OtherLinear(nn.Linear):
    """Stands for a LoRA or a quantised layer: has the weight of a linear layer, and computes something else."""

    def forward(self, x):
        return super().forward(x) * 1.5


def exchange(module: nn.Module, name: str) -> None:
    linear = getattr(module, name)
    other = OtherLinear(linear.in_features, linear.out_features)
    other.weight, other.bias = linear.weight, linear.bias
    setattr(module, name, other)


CHANGES = {
    "a layer in the MLP": lambda model: exchange(layer(model).intermediate, "dense"),
    "a layer after attention": lambda model: exchange(layer(model).attention.output, "dense"),
    "a query layer": lambda model: exchange(layer(model).attention.self, "query"),
    "the head's layer": lambda model: exchange(model.lm_head, "dense"),
    "an activation": lambda model: setattr(layer(model).intermediate, "intermediate_act_fn", nn.Tanh()),
    "word embeddings without padding": lambda model: model.set_input_embeddings(
        nn.Embedding.from_pretrained(model.get_input_embeddings().weight * 1.5, freeze=False)
    ),
    "a hook on a norm": lambda model: model.roberta.embeddings.LayerNorm.register_forward_hook(
        lambda module, inputs, output: output * 1.5
    ),
    "a hook on the head": lambda model: model.lm_head.register_forward_hook(
        lambda module, inputs, output: output * 1.5
    ),
    "a forward": lambda model: setattr(
        model.roberta.embeddings.LayerNorm, "forward", lambda x: nn.functional.layer_norm(x, x.shape[-1:]) * 2
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_are_not_what_they_were_keep_working(change, when):
    """Using only the parameters of a changed layer would drop the change silently."""
    model = make_model()
    batch = make_batch(model)
    unchanged, _ = run(model, batch)
    if when == "before":
        CHANGES[change](model)
        expected = run(model, batch)
        applied = huggingface.apply(model)
        if change != "a query layer":
            assert len(applied.left_alone) == 1
    else:
        huggingface.apply(model)
        CHANGES[change](model)
        reference = make_model()
        CHANGES[change](reference)
        expected = run(reference, batch)
    assert abs(expected[0] - unchanged) > 1e-4, "the change must matter"
    assert_close(run(model, batch), expected, 1e-5)


def test_a_subclass_with_its_own_forward_is_not_replaced():
    model = make_model()
    base = type(layer(model).output)
    custom = type("Custom", (base,), {"forward": lambda self, x, y: base.forward(self, x, y) + 1.0})
    layer(model).output.__class__ = custom
    assert huggingface.apply(model).replaced["layer_norm"] == 3


def test_errors():
    with pytest.raises(ValueError, match=r"Linear holds no part of a model .*; pass one of BERT, RoBERTa, .*ESM-2"):
        huggingface.apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="impl='cuda' is unknown"):
        huggingface.apply(make_model(), impl="cuda")


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "right"])
def test_attention_weights_on_request(padding):
    model = make_model(attn_implementation="eager").eval()
    batch = make_batch(model, padding)
    expected = model(**batch, output_attentions=True)
    huggingface.apply(model)
    found = model(**batch, output_attentions=True)
    assert len(found.attentions) == 2
    for ours, theirs in zip(found.attentions, expected.attentions):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions(dtype):
    model = make_model()
    batch = make_batch(model)
    allowed = torch.rand(3, 1, 17, 17) < 0.7
    allowed |= torch.eye(17, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    batch["attention_mask"] = allowed if dtype == torch.bool else additive
    expected = run(model, batch)
    huggingface.apply(model)
    assert_close(run(model, batch), expected, 1e-5)


def test_packed_documents():
    """Bounds given as for transformers' flash attention: as if every document were a batch of its own."""
    model = make_model().eval()
    documents = [torch.randint(4, VOCABULARY, (1, length)) for length in (5, 1, 9)]
    expected = torch.cat([model(document).logits for document in documents], 1)
    huggingface.apply(model)
    bounds = torch.tensor([0, 5, 6, 15])
    found = model(
        torch.cat(documents, 1), position_ids=torch.cat([torch.arange(d.shape[1]) + 2 for d in documents])[None],
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=9, max_length_k=9,
    ).logits  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_right_padding_is_recognised():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    padding = describe_padding(mask)
    assert padding.lengths.tolist() == [2, 3] and padding.lengths.dtype == torch.int32 and padding.rows is None
    padding = describe_padding(mask.flip(1))
    assert padding.lengths.tolist() == [2, 3] and padding.rows.tolist() == [1, 2, 0, 3, 4, 5]


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch_makes_accumulation_exact(as_tensor):
    model = make_model()
    batch = make_batch(model)
    expected = run(model, batch)
    huggingface.apply(model)
    total = int((batch["labels"] != -100).sum())
    model.zero_grad()
    loss = 0.0
    for row in range(3):
        part = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        output = model(**part, num_items_in_batch=torch.tensor(total) if as_tensor else total)
        output.loss.backward()
        loss = loss + output.loss.detach()
    assert_close((loss, {name: p.grad for name, p in model.named_parameters()}), expected, 1e-5)


def test_no_label_at_all_gives_a_zero_loss_without_nan():
    model = make_model()
    batch = make_batch(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    huggingface.apply(model)
    loss, gradients = run(model, batch)
    assert loss == 0 and gradients and all((gradient == 0).all() for gradient in gradients.values())


def test_ways_to_call_in_training():
    model = make_model()
    batch = make_batch(model)
    expected = model(**batch).loss
    huggingface.apply(model)
    (loss,) = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    arguments = (batch["input_ids"], batch["attention_mask"], None, None, None, None, None, batch["labels"])
    output = model(*arguments)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    assert output.logits is None
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    labels = batch.pop("labels")
    assert model(**batch).logits.shape == (*labels.shape, VOCABULARY)
    assert model(*arguments[:-1], None).loss is None


@pytest.mark.parametrize("name", MASKED_LM)
def test_sequence_classification(name):
    model = make_model(name, "ForSequenceClassification", num_labels=3)
    batch = make_batch(model)
    batch["labels"] = torch.tensor([0, 2, 1])
    expected = run(model, batch)
    applied = huggingface.apply(model)
    assert applied.replaced == {"attention": 2, "layer_norm": 4, "gelu": 2, "embedding": 1, "mlm_head": 0}
    assert_close(run(model, batch), expected, 1e-5)


def test_a_model_inside_another_module():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = BertModel(make_config(BertConfig, 0))

    assert huggingface.apply(Wrapped()).replaced["layer_norm"] == 4


# ---- interpreted, on a GPU ----------- ---------------------------------------------------------------------------------


def make_tiny(device, **settings):
    """Small enough for Triton's interpreter."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 20}
    return make_model("roberta", **sizes, **settings).to(device)


def make_tiny_batch(device):
    ids = torch.randint(4, 20, (2, 6), device=device)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], device=device)
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_triton_kernels_compute_the_same(device):
    """On a CPU in Triton's interpreter, hence the tiny model; dropout too, since the twins draw the same bits."""
    model = make_tiny(device, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch = make_tiny_batch(device)
    results = []
    for impl in ("torch", "triton"):
        applied = huggingface.apply(model, impl=impl)
        torch.manual_seed(7)
        results.append(run(model, batch))
        applied.revert()
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKED_LM)
@pytest.mark.parametrize("padding", ["none", "right", "anywhere"])
def test_on_a_gpu_loss_and_gradients_stay_the_same(name, padding):
    model = make_model(name, hidden_size=128).cuda()
    batch = make_batch(model, padding, "cuda")
    expected = run(model, batch)
    huggingface.apply(model)
    assert_close(run(model, batch), expected, 1e-4)


@pytest.mark.gpu
def test_a_captured_training_step_draws_new_dropout_on_replay():
    model = make_model(hidden_size=128, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).cuda().bfloat16()
    batch = make_batch(model, "right", "cuda")
    huggingface.apply(model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(model, batch)
    torch.cuda.synchronize()
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(**batch).loss
        loss.backward()
    losses = []
    for _ in range(2):
        graph.replay()
        losses.append(loss.item())
    assert losses[0] != losses[1] and all(math.isfinite(value) for value in losses)


def test_importing_is_light():
    code = (
        "import sys, fastroberta_kernels as k; assert 'torch' not in sys.modules\n"
        "assert k.huggingface.apply and k.attention.attention and 'transformers' not in sys.modules\n"
        "assert set(k.__all__) <= set(dir(k))\n"
        "try: k.nothing\n"
        "except AttributeError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "has no attribute 'nothing'" in result.stdout
