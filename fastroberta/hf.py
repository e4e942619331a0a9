"""Hugging Face checkpoints, in and out: one table of names, used in both directions.

The formats are those of transformers: `config.json`, `model.safetensors` and tokenizer files, for
`RobertaForMaskedLM`. Neither direction needs transformers to be installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from .checkpoint import write_tensors
from .cli.arguments import from_dict
from .config import ModelConfig
from .corpus.tokenizer import save_tokenizer, special_token_ids
from .errors import CheckpointError, ConfigurationError
from .model import RobertaForMaskedLM

# Hugging Face's name -> ours. The tied decoder (`lm_head.decoder.*`) is not stored by current versions of transformers.
OUTER_NAMES = {
    "roberta.embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "roberta.embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
    "roberta.embeddings.token_type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    "roberta.embeddings.LayerNorm.weight": "embeddings.LayerNorm.weight",
    "roberta.embeddings.LayerNorm.bias": "embeddings.LayerNorm.bias",
    "lm_head.dense.weight": "lm_head.dense.weight",
    "lm_head.dense.bias": "lm_head.dense.bias",
    "lm_head.layer_norm.weight": "lm_head.layer_norm.weight",
    "lm_head.layer_norm.bias": "lm_head.layer_norm.bias",
    "lm_head.bias": "lm_head.bias",
}
# Inside `roberta.encoder.layer.N` -> inside `layer.N`. Query, key and value are stacked, in this order, in one matrix.
LAYER_NAMES = {
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}
STACKED_NAMES = {"query_key_value": ("attention.self.query", "attention.self.key", "attention.self.value")}
# Rows beyond the vocabulary exist only inside the trainer.
VOCABULARY_ROWS = ("embeddings.word_embeddings.weight", "lm_head.bias")

# Settings of a config.json under which this model computes the same function.
REQUIRED = {"model_type": "roberta", "hidden_act": "gelu", "type_vocab_size": 1, "position_embedding_type": "absolute"}
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps", "initializer_range",
)  # fmt: skip


def to_huggingface(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename tensors that match the model's parameters (weights or moments) to Hugging Face's names.

    Args:
        tensors: every parameter's name -> a tensor of its shape.
    Returns:
        Hugging Face's name -> tensor, stacked matrices taken apart, vocabulary rows cut to `config.vocab_size`.
    """
    result = {}
    for theirs, ours in OUTER_NAMES.items():
        tensor = tensors[ours]
        result[theirs] = tensor[: config.vocab_size] if ours in VOCABULARY_ROWS else tensor
    for index in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            for theirs, ours in LAYER_NAMES.items():
                result[f"roberta.encoder.layer.{index}.{theirs}.{kind}"] = tensors[f"layer.{index}.{ours}.{kind}"]
            for ours, parts in STACKED_NAMES.items():
                pieces = tensors[f"layer.{index}.{ours}.{kind}"].chunk(len(parts))
                for theirs, piece in zip(parts, pieces):
                    result[f"roberta.encoder.layer.{index}.{theirs}.{kind}"] = piece
    return {name: tensor.detach().contiguous().cpu() for name, tensor in result.items()}


@torch.no_grad()
def copy_from_huggingface(
    source: dict[str, Tensor], target: dict[str, Tensor], config: ModelConfig, where: str
) -> None:
    """Copy tensors under Hugging Face's names into `target`, the inverse of `to_huggingface`.

    Raises:
        CheckpointError: a tensor is missing or has another shape; `where` says whose.
    """

    def take(name: str, into: Tensor) -> None:
        if name not in source:
            raise CheckpointError(f"{where}: tensor {name} is missing; is this a RobertaForMaskedLM checkpoint?")
        if source[name].shape != into.shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(source[name].shape)}, config.json says {tuple(into.shape)}"
            )
        into.copy_(source[name])

    for theirs, ours in OUTER_NAMES.items():
        tensor = target[ours]
        if ours in VOCABULARY_ROWS:
            tensor[config.vocab_size :] = 0
            tensor = tensor[: config.vocab_size]
        take(theirs, tensor)
    for index in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            for theirs, ours in LAYER_NAMES.items():
                take(f"roberta.encoder.layer.{index}.{theirs}.{kind}", target[f"layer.{index}.{ours}.{kind}"])
            for ours, parts in STACKED_NAMES.items():
                pieces = target[f"layer.{index}.{ours}.{kind}"].chunk(len(parts))
                for theirs, piece in zip(parts, pieces):
                    take(f"roberta.encoder.layer.{index}.{theirs}.{kind}", piece)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint keeps its weights there as safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); take another checkpoint") from error


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The sizes of a Hugging Face RoBERTa model, and its whole `config.json`.

    Raises:
        CheckpointError: not a RoBERTa that this model can compute.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a Hugging Face RoBERTa directory") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no settings by name; give a Hugging Face RoBERTa directory")
    for key, expected in REQUIRED.items():
        if content.get(key, expected) != expected:
            raise CheckpointError(f"{path}: {key} is {content[key]!r}, this model has {expected!r} only")
    missing = [key for key in SIZES if content.get(key) is None]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing; save the model again with a current transformers")
    try:
        config = from_dict(ModelConfig, {key: content[key] for key in SIZES})
    except ConfigurationError as error:
        what = str(error).replace("model.", "")
        raise CheckpointError(f"{path}: {what}; mend it, or take another checkpoint") from error
    pad = content.get("pad_token_id", 1)
    assert config.vocab_size is not None  # not missing
    if type(pad) is not int or not 0 <= pad < config.vocab_size:
        raise CheckpointError(f"{path}: pad_token_id is {pad!r}; give the id of the padding token")
    return config, content


def load_huggingface(directory: str | Path) -> RobertaForMaskedLM:
    """A model with the weights of a Hugging Face RoBERTa directory, in fp32, in eval mode.

    Raises:
        CheckpointError: the directory does not hold a RobertaForMaskedLM in safetensors.
    """
    directory = Path(directory)
    config, content = read_config(directory)
    model = RobertaForMaskedLM(config, pad_token_id=content.get("pad_token_id", 1))
    path = directory / "model.safetensors"
    tensors = read_tensors(path)
    decoder = tensors.get("lm_head.decoder.weight")
    copy_from_huggingface(tensors, dict(model.named_parameters()), config, str(path))
    if decoder is not None and not torch.equal(decoder, tensors["roberta.embeddings.word_embeddings.weight"]):
        raise CheckpointError(f"{path}: the decoder is not tied to the word embeddings; this model ties them")
    return model.eval()


def save_huggingface(
    model: RobertaForMaskedLM, tokenizer: Tokenizer, directory: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write what `AutoModelForMaskedLM`, `AutoTokenizer` and `pipeline("fill-mask")` load, the inverse of
    `load_huggingface`; `directory` is made if need be.

    Args:
        weights: parameter name -> fp32 tensor, in place of the model's own.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ids = special_token_ids(tokenizer)
    content = {
        "architectures": ["RobertaForMaskedLM"],
        **REQUIRED,
        **{key: getattr(model.config, key) for key in SIZES},
        "bos_token_id": ids.bos,
        "pad_token_id": ids.pad,
        "eos_token_id": ids.eos,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tensors(
        to_huggingface(weights or dict(model.named_parameters()), model.config),
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    save_tokenizer(tokenizer, directory, model_max_length=model.config.max_position_embeddings - 2)
