"""Hugging Face in and out: the same bytes, and transformers loads what we write."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastroberta.config import ModelConfig
from fastroberta.corpus.tokenizer import train_tokenizer
from fastroberta.errors import CheckpointError
from fastroberta.hf import load_huggingface, save_huggingface
from fastroberta.model import RobertaForMaskedLM

transformers = pytest.importorskip("transformers")

TEXT = ["The cat sat on the mat. The dog sat on the log. A cat and a dog sat on a mat and on a log."] * 4


@pytest.fixture
def tokenizer():
    return train_tokenizer(TEXT, 280)


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


def test_import_then_export_gives_the_same_bytes(tmp_path, tokenizer):
    config = transformers.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "theirs")
    save_huggingface(load_huggingface(tmp_path / "theirs"), tokenizer, tmp_path / "again")
    theirs, again = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert theirs.keys() == again.keys()
    for name in theirs:
        assert theirs[name].numpy().tobytes() == again[name].numpy().tobytes(), name


def test_transformers_loads_it_without_a_warning_and_computes_the_same(directory):
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(theirs).__name__ == "RobertaForMaskedLM"
    ours = load_huggingface(directory)
    input_ids = torch.randint(4, 250, (2, 20))
    with torch.no_grad():
        assert (theirs(input_ids).logits - ours(input_ids)).abs().max() < 1e-5


def test_fill_mask_pipeline(directory, tokenizer):
    loaded = transformers.AutoTokenizer.from_pretrained(directory)
    fill = transformers.pipeline("fill-mask", model=str(directory), tokenizer=loaded)
    answers = fill("The cat sat on the <mask>.")
    assert len(answers) == 5 and all(0 < answer["score"] < 1 for answer in answers)
    for text in ("The cat sat on the <mask>.", "A dog", "naïve 日本"):
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    # The mask takes the space before it, as RoBERTa's does.
    assert loaded("on <mask>")["input_ids"] == loaded("on<mask>")["input_ids"]


def test_config_of_another_model_is_refused(directory):
    path = directory / "config.json"
    original = json.loads(path.read_text())
    for key, value, message in (
        ("model_type", "bert", "model_type is 'bert', this model has 'roberta' only"),
        ("hidden_act", "gelu_new", "hidden_act"),
        ("type_vocab_size", 2, "type_vocab_size"),
    ):
        path.write_text(json.dumps({**original, key: value}))
        with pytest.raises(CheckpointError, match=message):
            load_huggingface(directory)
    del original["hidden_size"]
    path.write_text(json.dumps(original))
    with pytest.raises(CheckpointError, match="hidden_size missing"):
        load_huggingface(directory)


@pytest.mark.parametrize(
    "change, message",
    [
        (None, "holds no settings by name"),
        ({"hidden_size": "x"}, "hidden_size = x: takes a whole number"),
        ({"hidden_size": True}, "hidden_size = true: takes a whole number"),
        ({"vocab_size": None}, "vocab_size missing"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"num_attention_heads": 5}, "hidden_size = 32 must be a multiple of num_attention_heads = 5"),
    ],
)
def test_damaged_config_is_one_line(directory, change, message):
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
    save_file({**tensors, "lm_head.decoder.weight": torch.ones(280, 32)}, path)
    with pytest.raises(CheckpointError, match="not tied"):
        load_huggingface(directory)
    words = "roberta.embeddings.word_embeddings.weight"
    save_file({"lm_head.decoder.weight" if key == words else key: tensors[key] for key in tensors}, path)
    with pytest.raises(CheckpointError, match=f"tensor {words} is missing"):
        load_huggingface(directory)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_huggingface(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_huggingface(directory)
