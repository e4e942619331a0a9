"""Hugging Face checkpoints, in and out: one table of names, used in both directions.

What is written is what `AutoModelForMaskedLM` loads: `config.json`, `model.safetensors` and the tokenizer's files. What is
read may also be a BERT, an encoder with another head or none, in several files, or in `pytorch_model.bin`. Neither
direction needs transformers.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

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


class Family(NamedTuple):
    """What transformers calls this network under one of its model types."""

    architecture: str
    prefix: str  # of the encoder's tensors


FAMILIES = {
    "roberta": Family("RobertaForMaskedLM", "roberta."),
    "xlm-roberta": Family("XLMRobertaForMaskedLM", "roberta."),
    "camembert": Family("CamembertForMaskedLM", "roberta."),
    "data2vec-text": Family("Data2VecTextForMaskedLM", "data2vec_text."),
}
BERT = "bert"  # is read, and becomes a RoBERTa

WORDS = "roberta.embeddings.word_embeddings.weight"
POSITIONS = "roberta.embeddings.position_embeddings.weight"
TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"
DECODER, DECODER_BIAS, HEAD_BIAS = "lm_head.decoder.weight", "lm_head.decoder.bias", "lm_head.bias"
# RobertaForMaskedLM's name -> ours. A tied decoder has no tensor of its own.
OUTER_NAMES = {
    WORDS: "embeddings.word_embeddings.weight",
    POSITIONS: "embeddings.position_embeddings.weight",
    TOKEN_TYPES: "embeddings.token_type_embeddings.weight",
    "roberta.embeddings.LayerNorm.weight": "embeddings.LayerNorm.weight",
    "roberta.embeddings.LayerNorm.bias": "embeddings.LayerNorm.bias",
    "lm_head.dense.weight": "lm_head.dense.weight",
    "lm_head.dense.bias": "lm_head.dense.bias",
    "lm_head.layer_norm.weight": "lm_head.layer_norm.weight",
    "lm_head.layer_norm.bias": "lm_head.layer_norm.bias",
    HEAD_BIAS: "lm_head.bias",
}
# Inside `roberta.encoder.layer.N` -> inside `layer.N`, and which part of its rows of how many: query, key and value are
# stacked in one matrix.
LAYER_NAMES = {
    "attention.self.query": ("query_key_value", 0, 3),
    "attention.self.key": ("query_key_value", 1, 3),
    "attention.self.value": ("query_key_value", 2, 3),
    "attention.output.dense": ("attention_output", 0, 1),
    "attention.output.LayerNorm": ("attention_norm", 0, 1),
    "intermediate.dense": ("intermediate", 0, 1),
    "output.dense": ("output", 0, 1),
    "output.LayerNorm": ("output_norm", 0, 1),
}
# Rows beyond the vocabulary exist only inside the trainer.
VOCABULARY_ROWS = ("embeddings.word_embeddings.weight", "lm_head.bias", "decoder.weight")
# What other classes call the same tensors: BERT, an encoder alone, and files converted from TensorFlow.
RENAMED = (
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^(bert|data2vec_text)\.", "roberta."),
    (r"^(?=(embeddings|encoder|pooler)\.)", "roberta."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
    (r"^cls\.predictions\.(transform\.)?", "lm_head."),
)

# In the order in which transformers looks for them. An index names the files that the weights are spread over.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps", "initializer_range",
)  # fmt: skip
# What may be missing, and what it is then.
VARIANTS = {"model_type": "roberta", "hidden_act": "gelu", "type_vocab_size": 1, "tie_word_embeddings": True}


class Pretrained(NamedTuple):
    """The content of a Hugging Face directory, as the weights of a RobertaForMaskedLM.

    Attributes:
        tensors: on the CPU, by the names of RobertaForMaskedLM. Without a head, none begins with `lm_head.`.
        notes: what was converted or left out, one line each.
    """

    config: ModelConfig
    pad_token_id: int
    tensors: dict[str, Tensor]
    notes: list[str]
    where: str

    @property
    def has_head(self) -> bool:
        return any(name.startswith("lm_head.") for name in self.tensors)

    def build(self, seed: int | None = None) -> RobertaForMaskedLM:
        """A model with these weights, in fp32. A missing head is drawn at random from `seed`, if there is one.

        Raises:
            CheckpointError: a tensor, or without a seed the head, is missing, or a tensor has the wrong shape.
        """
        model = RobertaForMaskedLM(self.config, self.pad_token_id)
        if not self.has_head:
            if seed is None:
                raise CheckpointError(
                    f"{self.where}: has no masked-LM head (tensor lm_head.dense.weight is missing); python -m "
                    f"fastroberta.train --init_from {self.where} trains a new one"
                )
            model.init_weights(seed)
        copy_from_huggingface(self.tensors, dict(model.named_parameters()), self.config, self.where, self.has_head)
        return model


def list_names(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """RobertaForMaskedLM's name of every tensor -> our parameter, which part of its rows, and of how many."""
    names = {theirs: (ours, 0, 1) for theirs, ours in OUTER_NAMES.items()}
    if not config.tie_word_embeddings:
        names[DECODER] = ("decoder.weight", 0, 1)
    for index in range(config.num_hidden_layers):
        for theirs, (ours, part, parts) in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                name = f"roberta.encoder.layer.{index}.{theirs}.{kind}"
                names[name] = (f"layer.{index}.{ours}.{kind}", part, parts)
    return names


def _take_view(tensors: dict[str, Tensor], config: ModelConfig, ours: str, part: int, parts: int) -> Tensor:
    tensor = tensors[ours].chunk(parts)[part]
    return tensor[: config.vocab_size] if ours in VOCABULARY_ROWS else tensor


def to_huggingface(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename tensors that match the model's parameters (weights or moments) to Hugging Face's names.

    Args:
        tensors: every parameter's name -> a tensor of its shape.
    Returns:
        the name in the class that `config.model_type` stands for -> tensor on the CPU. Stacked matrices are taken apart,
        vocabulary rows cut to `config.vocab_size`.
    """
    prefix = FAMILIES[config.model_type].prefix
    result = {}
    for theirs, place in list_names(config).items():
        name = theirs.replace("roberta.", prefix, 1)
        result[name] = _take_view(tensors, config, *place).detach().contiguous().cpu()
    if not config.tie_word_embeddings:
        # transformers adds the decoder's own bias, and keeps `lm_head.bias` without using it.
        result[DECODER_BIAS] = result[HEAD_BIAS].clone()
    return result


@torch.no_grad()
def copy_from_huggingface(
    source: dict[str, Tensor], target: dict[str, Tensor], config: ModelConfig, where: str, has_head: bool = True
) -> None:
    """Copy tensors under RobertaForMaskedLM's names into `target`, the inverse of `to_huggingface`.

    Args:
        has_head: whether `source` holds the head; if not, that of `target` stays.
    Raises:
        CheckpointError: a tensor is missing or has another shape; `where` says whose.
    """
    for name, place in list_names(config).items():
        if not has_head and name.startswith("lm_head."):
            continue
        into = _take_view(target, config, *place)
        if name not in source:
            raise CheckpointError(f"{where}: tensor {name} is missing; is this a RobertaForMaskedLM checkpoint?")
        if source[name].shape != into.shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(source[name].shape)}, config.json says {tuple(into.shape)}"
            )
        into.copy_(source[name])
    for name in VOCABULARY_ROWS:
        if name in target:
            target[name][config.vocab_size :] = 0


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, on the CPU, by the names that RobertaForMaskedLM has for them.

    Raises:
        CheckpointError: a file is missing or damaged, or its pickle holds more than tensors.
    """
    path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{directory}: holds no weights, neither model.safetensors nor pytorch_model.bin; give the directory of a model"
        )
    files = [path]
    if path.suffix == ".json":
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(directory / Path(name).name for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: names no files under weight_map ({error}); download it again") from error
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _read_file(file)
    tensors = {}
    for name, tensor in found.items():
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        tensors[name] = tensor
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, but named in the index of the weights; download it again")
    try:
        # weights_only: a pickle could run any code.
        is_pickled = path.suffix == ".bin"
        tensors = torch.load(path, map_location="cpu", weights_only=True) if is_pickled else load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); use another checkpoint") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: contains more than named tensors; save the model with save_pretrained")
    return tensors


def read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The sizes of a Hugging Face model, a BERT's as those of the RoBERTa that it becomes, and its whole `config.json`.

    Raises:
        CheckpointError: not a network that this model can compute.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a Hugging Face RoBERTa directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a Hugging Face RoBERTa directory") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; give a Hugging Face RoBERTa directory")
    kind = content.get("model_type", "roberta")
    if kind not in (*FAMILIES, BERT):
        raise CheckpointError(f"{path}: model_type is {kind!r}; this model can be {', '.join(FAMILIES)} or {BERT}")
    if (positions := content.get("position_embedding_type", "absolute")) != "absolute":
        raise CheckpointError(f"{path}: position_embedding_type is {positions!r}; this model has 'absolute' only")
    missing = [key for key in SIZES if content.get(key) is None]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing; save the model again with a current transformers")
    values = {key: content[key] for key in SIZES} | {key: content.get(key, usual) for key, usual in VARIANTS.items()}
    values["model_type"] = "roberta" if kind == BERT else kind
    try:
        config = from_dict(ModelConfig, values)
    except ConfigurationError as error:
        what = str(error).replace("model.", "")
        raise CheckpointError(f"{path}: {what}; fix it, or use another checkpoint") from error
    assert config.vocab_size is not None  # not missing
    pad = content.setdefault("pad_token_id", 0 if kind == BERT else 1)
    if type(pad) is not int or not 0 <= pad < config.vocab_size:
        raise CheckpointError(f"{path}: pad_token_id is {pad!r}; give the id of the padding token")
    if kind == BERT:
        config.max_position_embeddings += max(pad + 1, 2)
        config.type_vocab_size = 1
    return config, content


def longest_sequence(num_rows: int, pad_token_id: int) -> int:
    """How many tokens a position table of so many rows is enough for.

    Positions start at `pad_token_id + 1`. Where that is 1, the second row is counted out as well, as everywhere here.
    """
    return num_rows - max(pad_token_id + 1, 2)


def lay_positions(rows: Tensor, pad_token_id: int, count: int) -> Tensor:
    """A position table (count + 2, d), or longer for a padding id above 1, from the rows (n, d) of n positions.

    RoBERTa counts positions from `pad_token_id + 1`. More positions than rows repeat them, as Longformer does (Beltagy et
    al., arXiv 2004.05150, section 5).
    """
    first = pad_token_id + 1
    table = rows.new_zeros(count + max(first, 2), rows.shape[1])
    table[first : first + count] = rows.repeat(math.ceil(count / len(rows)), 1)[:count]
    return table


def read_pretrained(directory: Path) -> Pretrained:
    """The weights of a Hugging Face directory, converted to those of a RobertaForMaskedLM.

    Raises:
        CheckpointError: not a network that this model can compute, or a file is missing or damaged.
    """
    config, content = read_config(directory)
    pad_token_id = content["pad_token_id"]
    tensors = read_tensors(directory)
    notes = []
    if content.get("model_type") == BERT and {POSITIONS, TOKEN_TYPES} <= tensors.keys():
        count = len(tensors[POSITIONS])
        tensors[POSITIONS] = lay_positions(tensors[POSITIONS], pad_token_id, count)
        tensors[TOKEN_TYPES] = tensors[TOKEN_TYPES][:1]
        notes.append(
            f"BERT becomes RoBERTa: its {count:,} positions now start at {pad_token_id + 1}, and every token is of type 0"
        )
        if config.hidden_act != "gelu":
            notes[-1] += f"; the head computes the exact GELU in place of {config.hidden_act}"
    if others := {str(tensor.dtype)[6:] for tensor in tensors.values()} - {"float32", "int64"}:
        notes.append(f"weights in {' and '.join(sorted(others))} become float32")
    if DECODER_BIAS in tensors:
        tensors[HEAD_BIAS] = tensors.pop(DECODER_BIAS)  # it is the one that transformers uses
    if DECODER in tensors and config.tie_word_embeddings:
        # As transformers does: a decoder of its own counts, whatever config.json says.
        if WORDS in tensors and not torch.equal(tensors[DECODER], tensors[WORDS]):
            config.tie_word_embeddings = False
            notes.append("the decoder differs from the word embeddings, and stays untied")
        else:
            tensors.pop(DECODER)
    pretrained = Pretrained(config, pad_token_id, tensors, notes, str(directory))
    if not pretrained.has_head:
        config.tie_word_embeddings = True
        notes.append("has no masked-LM head: a new one starts from random weights")
    return pretrained._replace(tensors=_leave_out(tensors, config, notes))


def _leave_out(tensors: dict[str, Tensor], config: ModelConfig, notes: list[str]) -> dict[str, Tensor]:
    """The tensors that the model has; the others are named in the notes."""
    names = list_names(config)
    others = (name for name in tensors if name not in names and not name.endswith("position_ids"))
    modules = list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in others))
    if modules:
        rest = f" and {len(modules) - 8:,} more" if len(modules) > 8 else ""
        notes.append(f"left out: {', '.join(modules[:8])}{rest}")
    return {name: tensor for name, tensor in tensors.items() if name in names}


def load_huggingface(directory: str | Path) -> RobertaForMaskedLM:
    """A model with the weights of a Hugging Face directory, in fp32, in eval mode.

    Raises:
        CheckpointError: the directory does not hold a masked-LM model that this one can compute.
    """
    return read_pretrained(Path(directory)).build().eval()


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
        "architectures": [FAMILIES[model.config.model_type].architecture],
        **{key: getattr(model.config, key) for key in (*VARIANTS, *SIZES)},
        "position_embedding_type": "absolute",
        "bos_token_id": ids.bos,
        "pad_token_id": model.pad_token_id,  # positions count from it
        "eos_token_id": ids.eos,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tensors(
        to_huggingface(weights or dict(model.named_parameters()), model.config),
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    longest = longest_sequence(model.config.max_position_embeddings, model.pad_token_id)
    save_tokenizer(tokenizer, directory, model_max_length=longest)
