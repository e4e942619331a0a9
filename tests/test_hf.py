"""Hugging Face in and out: the same bytes, and transformers loads what we write."""

import json
import re

import pytest
import torch
from pretrained import TEXT, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from fastroberta.cli.program import run
from fastroberta.config import ModelConfig
from fastroberta.embed import main as embed
from fastroberta.errors import CheckpointError
from fastroberta.export import main as export
from fastroberta.hf import DECODER_BIAS, HEAD_BIAS, load_huggingface, read_pretrained, save_huggingface
from fastroberta.model import AttentionScope, RobertaForMaskedLM

transformers = pytest.importorskip("transformers")

# What is read: model type, settings of its config.json, and how it is saved.
SHARDS = {"max_shard_size": "20KB"}
KINDS = {
    "roberta": ("roberta", {}, {}),
    "xlm-roberta": ("xlm-roberta", {}, {}),
    "camembert": ("camembert", {}, {}),
    "data2vec-text": ("data2vec-text", {}, {}),
    "two token types": ("roberta", {"type_vocab_size": 2}, {}),
    "gelu_new": ("roberta", {"hidden_act": "gelu_new"}, {}),
    "gelu_pytorch_tanh": ("xlm-roberta", {"hidden_act": "gelu_pytorch_tanh"}, {}),
    "untied": ("roberta", {"tie_word_embeddings": False}, {}),
    "shards": ("roberta", {}, SHARDS),
    "bert": ("bert", {"type_vocab_size": 2, "max_position_embeddings": 40}, {}),
    "bert with a pooler, in shards": ("bert", {"type_vocab_size": 2}, SHARDS),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make_tokenizer(kind) for kind, _, _ in KINDS.values()}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["roberta"]


@pytest.fixture
def directory(tmp_path, tokenizer):
    size = tokenizer.get_vocab_size()
    model = RobertaForMaskedLM(
        ModelConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=66,
        )
    )  # fmt: skip
    model.init_weights(4)
    save_huggingface(model, tokenizer, tmp_path / "ours")
    return tmp_path / "ours"


def compute_logits(model, input_ids):
    with torch.no_grad():
        logits = model(input_ids)
    return getattr(logits, "logits", logits)


@pytest.mark.parametrize("name", KINDS)
def test_import_and_export_of_each_kind(tmp_path, tokenizers, name):
    kind, settings, save = KINDS[name]
    head = "PreTraining" if "pooler" in name else "MaskedLM"
    tokenizer = tokenizers[kind]
    theirs = make_model(tmp_path / "theirs", kind, tokenizer, head, save, **settings)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == bool(save)
    # To the last position: 40 tokens.
    input_ids = torch.randint(5, tokenizer.get_vocab_size() - 1, (2, 40))
    expected = compute_logits(theirs, input_ids) if head == "MaskedLM" else theirs(input_ids).prediction_logits
    assert (compute_logits(load_huggingface(tmp_path / "theirs"), input_ids) - expected).abs().max() < 1e-5

    assert export([str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    again, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (compute_logits(again.eval(), input_ids) - expected).abs().max() < 1e-5
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert loaded(TEXT[0])["input_ids"] == tokenizer.encode(TEXT[0]).ids
    assert loaded.mask_token_id == tokenizer.token_to_id("[MASK]" if kind == "bert" else "<mask>")

    if kind == "bert":
        assert type(again).__name__ == "RobertaForMaskedLM"
        return
    assert type(again) is type(theirs)
    before = {}
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        before |= load_file(path)
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == before.keys()
    for key in before:  # with an untied decoder, the bias of the head has no effect in transformers
        source = DECODER_BIAS if key == HEAD_BIAS and DECODER_BIAS in before else key
        assert before[source].numpy().tobytes() == after[key].numpy().tobytes(), key


def test_a_padding_id_above_one_leaves_fewer_positions(tmp_path, tokenizer, capsys):
    content = json.loads(tokenizer.to_str())
    ids = content["model"]["vocab"]
    ids |= {"<pad>": 3, "<unk>": 1}
    for token in content["added_tokens"]:
        token["id"] = ids[token["content"]]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=24,
    )  # fmt: skip
    model = RobertaForMaskedLM(config, pad_token_id=3)
    model.init_weights(1)
    save_huggingface(model, tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 20
    assert compute_logits(model.eval(), torch.full((1, 20), 9)).shape[1] == 20
    assert embed([str(tmp_path), TEXT[0] * 9, "--out", str(tmp_path / "vectors.npy"), "--precision", "fp32"]) == 0
    assert "longer than the model's 20 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_read_as_tensors_only(tmp_path, tokenizer, name):
    """As transformers wrote them: with the tied decoder, and with the names of TensorFlow for LayerNorm."""
    theirs = make_model(tmp_path, "roberta", tokenizer)
    (tmp_path / "model.safetensors").unlink()
    tensors = {re.sub("LayerNorm.weight$", "LayerNorm.gamma", key): one for key, one in theirs.state_dict().items()}
    assert "lm_head.decoder.weight" in tensors
    files = [{key: one for key, one in tensors.items() if ("encoder" in key) == half} for half in (False, True)]
    if name.endswith(".json"):
        weight_map = {}
        for index, part in enumerate(files):
            torch.save(part, tmp_path / f"part-{index}.bin")
            weight_map |= dict.fromkeys(part, f"part-{index}.bin")
        (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, tmp_path / name)
    input_ids = torch.randint(5, 270, (2, 20))
    logits = compute_logits(load_huggingface(tmp_path), input_ids)
    assert (logits - compute_logits(theirs, input_ids)).abs().max() < 1e-5

    path = tmp_path / "part-1.bin" if name.endswith(".json") else tmp_path / name
    torch.save({"weights": CheckpointError("code")}, path)
    with pytest.raises(CheckpointError, match=f"{path.name}: cannot be read"):
        load_huggingface(tmp_path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match=f"{path.name}: contains more than named tensors"):
        load_huggingface(tmp_path)
    if name.endswith(".json"):
        path.unlink()
        with pytest.raises(CheckpointError, match=r"part-1.bin: missing, but named in the index"):
            load_huggingface(tmp_path)
        (tmp_path / name).write_text("{}")
        with pytest.raises(CheckpointError, match="names no files under weight_map"):
            load_huggingface(tmp_path)


@pytest.mark.parametrize(
    "kind, head, left_out",
    [
        ("roberta", "", "pooler.dense"),
        ("roberta", "SequenceClassification", "classifier.dense, classifier.out_proj"),
        ("bert", "", "roberta.pooler.dense"),
        ("xlm-roberta", "TokenClassification", "classifier"),
    ],
)
def test_an_encoder_without_a_masked_lm_head_gets_a_new_one(tmp_path, tokenizers, capsys, kind, head, left_out):
    theirs = make_model(tmp_path / "theirs", kind, tokenizers[kind], head)
    pretrained = read_pretrained(tmp_path / "theirs")
    *_, new, rest = pretrained.notes
    assert new == "has no masked-LM head: a new one starts from random weights"
    assert rest.startswith("left out: ") and rest.endswith(left_out)
    ours, same, other = (pretrained.build(seed).eval() for seed in (3, 3, 4))
    assert torch.equal(ours.lm_head.dense.weight, same.lm_head.dense.weight)
    assert not torch.equal(ours.lm_head.dense.weight, other.lm_head.dense.weight)
    input_ids = torch.randint(5, tokenizers[kind].get_vocab_size() - 1, (2, 20))
    with torch.no_grad():
        base = theirs.base_model(input_ids).last_hidden_state
        hidden = ours.encode(input_ids, AttentionScope())
    assert (hidden - base).abs().max() < 1e-5
    assert run(lambda: export([str(tmp_path / "theirs"), str(tmp_path / "out")])) == 6
    assert "has no masked-LM head" in capsys.readouterr().err


def test_conversions_are_said_in_a_line(tmp_path, tokenizers, capsys):
    settings = {"type_vocab_size": 2, "max_position_embeddings": 40, "hidden_act": "gelu_new"}
    make_model(tmp_path / "bert", "bert", tokenizers["bert"], "PreTraining", **settings)
    assert export([str(tmp_path / "bert"), str(tmp_path / "out")]) == 0
    first, conversion, left_out = capsys.readouterr().out.splitlines()
    assert "ready for transformers" in first
    assert conversion == (
        f"{tmp_path / 'bert'}: BERT becomes RoBERTa: its 40 positions now start at 1, and every token is of type 0; the "
        "head computes the exact GELU in place of gelu_new"
    )
    assert left_out == f"{tmp_path / 'bert'}: left out: roberta.pooler.dense, cls.seq_relationship"


def test_half_precision_becomes_fp32(directory):
    path = directory / "model.safetensors"
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    pretrained = read_pretrained(directory)
    assert pretrained.notes == ["weights in bfloat16 become float32"]
    assert all(parameter.dtype == torch.float32 for parameter in pretrained.build().parameters())


def test_a_decoder_of_its_own_counts_whatever_the_config_says(directory):
    """As in transformers 5."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    words = tensors["roberta.embeddings.word_embeddings.weight"]
    save_file({**tensors, "lm_head.decoder.weight": words + torch.randn_like(words)}, path, {"format": "pt"})
    pretrained = read_pretrained(directory)
    assert pretrained.notes == ["the decoder differs from the word embeddings, and stays untied"]
    input_ids = torch.randint(5, 270, (2, 20))
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()
    assert (compute_logits(pretrained.build().eval(), input_ids) - compute_logits(theirs, input_ids)).abs().max() < 1e-5


def test_fill_mask_pipeline(directory, tokenizer):
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    fill = transformers.pipeline("fill-mask", model=str(directory), tokenizer=loaded)
    answers = fill("The cat sat on the <mask>.")
    assert len(answers) == 5 and all(0 < answer["score"] < 1 for answer in answers)
    for text in ("The cat sat on the <mask>.", "A dog", "naïve 日本"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    # The mask takes the space before it, as RoBERTa's does.
    assert loaded("on <mask>")["input_ids"] == loaded("on<mask>")["input_ids"]


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "is not a JSON object"),
        ({"model_type": "electra"}, "model_type is 'electra'; this model can be roberta, xlm-roberta, .* or bert"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "relu"}, "hidden_act = relu: takes gelu, gelu_new"),
        ({"hidden_size": "x"}, "hidden_size = x: takes a whole number"),
        ({"hidden_size": True}, "hidden_size = true: takes a whole number"),
        ({"vocab_size": None}, "vocab_size missing"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"num_attention_heads": 5}, "hidden_size = 32 must be a multiple of num_attention_heads = 5"),
    ],
)
def test_a_config_that_is_damaged_or_of_another_network_is_one_line(directory, change, message):
    path = directory / "config.json"
    path.write_text(json.dumps([] if change is None else {**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        load_huggingface(directory)


def test_missing_and_misshapen_tensors_are_named(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "roberta.encoder.layer.1.attention.self.key.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        load_huggingface(directory)
    save_file({**tensors, name: torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"has shape \(3, 3\), config.json says \(32, 32\)"):
        load_huggingface(directory)
    words = "roberta.embeddings.word_embeddings.weight"
    save_file({"lm_head.decoder.weight" if key == words else key: tensors[key] for key in tensors}, path)
    with pytest.raises(CheckpointError, match=f"tensor {words} is missing"):
        load_huggingface(directory)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_huggingface(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights, neither model.safetensors nor pytorch_model.bin"):
        load_huggingface(directory)
