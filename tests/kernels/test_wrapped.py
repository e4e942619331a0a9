"""Encoders with the kernels inside under what people put around a model: the same loss and gradients as without kernels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")

from encoders import assert_close, make_batch, make_model, run
from fastroberta_kernels import huggingface


def strip(results, prefix: str):
    loss, gradients = results
    return loss, {name.removeprefix(prefix): gradient for name, gradient in gradients.items()}


# ---- torch.compile, torch.export -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["roberta", *[pytest.param(name, marks=pytest.mark.slow(reason="6 seconds")) for name in ("distilbert", "esm")]],
)
def test_compiled_as_one_graph_of_any_size(name):
    model = make_model(name, num_hidden_layers=1)
    batch = make_batch(model, "anywhere")
    smaller = {key: tensor[:2, :11].contiguous() for key, tensor in batch.items()}
    expected = [run(model, each) for each in (batch, smaller)]
    huggingface.apply(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for each, results in zip((batch, smaller), expected):
        assert_close(strip(run(compiled, each), "_orig_mod."), results, 1e-5)


@pytest.mark.slow(reason="6 seconds")
def test_compiled_dropout_is_that_of_eager_execution():
    model = make_model(num_hidden_layers=1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch = make_batch(model, "anywhere")
    huggingface.apply(model)
    torch.manual_seed(7)
    expected = run(model, batch)
    torch._dynamo.reset()
    torch.manual_seed(7)
    found = run(torch.compile(model, fullgraph=True, backend="aot_eager"), batch)
    assert_close(strip(found, "_orig_mod."), expected, 1e-5)


@pytest.mark.slow(reason="4 seconds each")
@pytest.mark.parametrize("is_training", [True, False])
def test_exported_for_any_size(is_training):
    """In training with the loss of the kernel, in evaluation with logits."""
    model = make_model(num_hidden_layers=1).train(is_training)
    batch = make_batch(model, "anywhere")
    smaller = {key: tensor[:2, :11].contiguous() for key, tensor in batch.items()}
    expected = run(model, smaller)
    logits = model(**smaller).logits
    huggingface.apply(model)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=38)}
    exported = torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, sizes)).module()
    assert_close(run(exported, smaller), expected, 1e-5)
    if not is_training:
        torch.testing.assert_close(exported(**smaller).logits, logits, rtol=1e-5, atol=1e-5)


# ---- distributed -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group():
    """One process: what a wrapper does to modules and parameters is the same for one and for many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_ddp(process_group, when):
    model = make_model()
    batch = make_batch(model)
    expected = run(model, batch)
    if when == "before":
        huggingface.apply(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        huggingface.apply(wrapped)
    for _ in range(2):  # the second step uses the buckets of the first
        assert_close(strip(run(wrapped, batch), "module."), expected, 1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp2(process_group, when):
    model = make_model()
    batch = make_batch(model)
    expected = run(model, batch)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    applied = huggingface.apply(model) if when == "before" else None
    for layer in model.roberta.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    applied = applied or huggingface.apply(model)
    assert applied.replaced == {"attention": 2, "layer_norm": 4, "gelu": 2, "embedding": 1, "mlm_head": 1}
    second = huggingface.apply(model)
    assert not any(second.replaced.values()), "what lies below FSDP's classes is known as replaced"

    def run_whole():
        loss, gradients = run(model, batch)
        return loss, {name: gradient.full_tensor() for name, gradient in gradients.items()}

    assert_close(run_whole(), expected, 1e-5)
    applied.revert()
    assert_close(run_whole(), expected, 1e-5)
    assert model(**batch).logits is not None and isinstance(model, torch.distributed.fsdp.FSDPModule)


# ---- gradient checkpointing, autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = make_model()
    batch = make_batch(model)
    expected = run(model, batch)
    huggingface.apply(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_close(run(model, batch), expected, 1e-5)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "esm"])
def test_autocast_is_as_exact_as_before(name):
    model = make_model(name)
    batch = make_batch(model)
    loss, exact = run(model, batch)

    def measure_errors() -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16):
            found_loss, found = run(model, batch)
        assert found_loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in found.values())
        return abs(found_loss - loss), math.sqrt(sum((found[key] - exact[key]).square().sum().item() for key in exact))

    loss_before, before = measure_errors()
    huggingface.apply(model)
    loss_after, after = measure_errors()
    assert loss_after <= 2 * loss_before + 2**-7 * loss and after <= 1.5 * before


# ---- adapters, sentence encoders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "dense", "decoder"]], ids="+".join)
def test_lora(targets, when):
    """Adapters on linear layers that the kernels would have passed by."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, lora_alpha=8, init_lora_weights=False)

    def make_adapted(apply_when: str | None):
        model = make_model()
        if apply_when == "before":
            huggingface.apply(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        return model, huggingface.apply(model) if apply_when == "after" else None

    reference, _ = make_adapted(None)
    batch = make_batch(reference)
    expected = run(reference, batch)
    assert len(expected[1]) > 7, "several adapters learn"
    model, applied = make_adapted(when)
    if applied:
        has_dense = "dense" in targets
        assert applied.replaced == {
            "attention": 2, "layer_norm": 0 if has_dense else 4, "gelu": 0 if has_dense else 2, "embedding": 1,
            "mlm_head": 0 if has_dense else 1,
        }  # fmt: skip
    assert_close(run(model, batch), expected, 1e-5)


def test_sentence_transformers(tmp_path):
    """The encoder of a sentence encoder, which people train and use through another package."""
    package = pytest.importorskip("sentence_transformers")
    import tokenizers
    import transformers

    encoder = make_model("bert", "Model").eval()
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{chr(97 + i): 4 + i for i in range(26)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    model = package.SentenceTransformer(str(tmp_path), device="cpu")  # adds mean pooling
    sentences = ["a b c", "d e f g h i", "j"]
    expected = model.encode(sentences, convert_to_tensor=True)
    applied = huggingface.apply(model[0].auto_model)
    assert applied.replaced == {"attention": 2, "layer_norm": 4, "gelu": 2, "embedding": 1, "mlm_head": 0}
    torch.testing.assert_close(model.encode(sentences, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5)
    applied.revert()
    assert huggingface.apply(model).replaced["layer_norm"] == 4, "the whole SentenceTransformer can be passed too"


# ---- torch.func ------------------------------------------------------------------------------------------------------


def test_functional_gradients_and_those_of_single_samples():
    """Without a mask: transformers itself reads the values of a mask, which vmap refuses."""
    model = make_model(num_hidden_layers=1, attn_implementation="eager")
    batch = make_batch(model, "none")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, sample):
        sample = {name: tensor[None] for name, tensor in sample.items()}
        return torch.func.functional_call(model, parameters, kwargs=sample).loss

    def compute():
        first = {name: tensor[0] for name, tensor in batch.items()}
        return torch.func.grad(loss)(parameters, first), torch.vmap(torch.func.grad(loss), (None, 0))(parameters, batch)

    expected = compute()
    huggingface.apply(model)
    for found, theirs in zip(compute(), expected):
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
