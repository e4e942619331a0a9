"""The model that a run starts with: random weights, those of a Hugging Face directory, or room for a checkpoint's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..checkpoint import verify_directory
from ..config import ModelConfig, TrainConfig
from ..corpus.manifest import Manifest
from ..corpus.tokenizer import load_tokenizer, tokenizer_hash
from ..errors import ConfigurationError
from ..hf import POSITIONS, Pretrained, lay_positions, read_config, read_pretrained
from ..model import RobertaForMaskedLM
from .vocabulary import resize_vocabulary


def build_model(
    config: TrainConfig, manifest: Manifest, checkpoint: Path | None = None
) -> tuple[RobertaForMaskedLM, list[str]]:
    """The model as configured, with its initial weights, in fp32 on the CPU, and what is to be said about them.

    What the configuration leaves to the data, to `init_from` or to the checkpoint is set in `config.model`.

    Args:
        checkpoint: whose weights will replace the initial ones. `init_from` is not read again then.
    Raises:
        CheckpointError: `init_from` is damaged.
        ConfigurationError: the configuration, the data and `init_from` do not fit together.
    """
    if checkpoint is not None and (config.init_from or config.resume_from):
        sizes, content = read_config(checkpoint)
        config.model = _keep_dropout(sizes, config)
        model, notes = RobertaForMaskedLM(config.model, content["pad_token_id"]), []
    elif config.init_from is not None:
        pretrained = _read_initial_model(config, manifest, Path(config.init_from))
        config.model = _keep_dropout(pretrained.config, config)
        model = pretrained._replace(config=config.model).build(config.seed)
        notes = [f"{config.init_from}: {note}" for note in pretrained.notes]
    else:
        pad_token_id = manifest.special_token_ids["pad_token_id"]
        _settle_sizes(config, manifest, pad_token_id)
        model, notes = RobertaForMaskedLM(config.model, pad_token_id), []
        model.init_weights(config.seed)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model, notes


def _keep_dropout(sizes: ModelConfig, config: TrainConfig) -> ModelConfig:
    """Sizes come from a checkpoint; dropout is a choice of the run."""
    return dataclasses.replace(
        sizes,
        hidden_dropout_prob=config.model.hidden_dropout_prob,
        attention_probs_dropout_prob=config.model.attention_probs_dropout_prob,
    )


def _settle_sizes(config: TrainConfig, manifest: Manifest, pad_token_id: int) -> None:
    """Set the sizes that follow from the data."""
    given = config.model.vocab_size
    if given is not None and given < manifest.vocab_size:
        raise ConfigurationError(
            f"model.vocab_size: {given}, but the tokenizer of {manifest.directory} has {manifest.vocab_size} ids; leave it "
            "null"
        )
    config.model.vocab_size = given or manifest.vocab_size
    needed = config.max_seq_length + max(pad_token_id + 1, 2)
    # The position table is longer than its default where the id of padding is above 1.
    config.model.max_position_embeddings = max(config.model.max_position_embeddings, needed)


def _read_initial_model(config: TrainConfig, manifest: Manifest, directory: Path) -> Pretrained:
    """The model of `init_from`, with the vocabulary of the data and enough positions."""
    verify_directory(directory)
    pretrained = read_pretrained(directory)
    tokenizer, size = load_tokenizer(directory), pretrained.config.vocab_size
    assert size is not None  # every checkpoint says it
    is_same = tokenizer_hash(tokenizer) == manifest.tokenizer_sha256
    if config.resize_vocabulary and not (is_same and size == manifest.vocab_size):
        pretrained = resize_vocabulary(pretrained, tokenizer, load_tokenizer(manifest.directory))
    elif not is_same:
        raise ConfigurationError(
            f"init_from: {directory} has another tokenizer than {manifest.directory}; prepare the data with --tokenizer "
            f"{directory}, or fit the model to the data with --resize_vocabulary"
        )
    elif size < manifest.vocab_size:
        raise ConfigurationError(
            f"init_from: {directory} has embeddings for {size} tokens, but its tokenizer has {manifest.vocab_size}; add "
            "--resize_vocabulary"
        )
    return _extend_positions(pretrained, config, directory)


def _extend_positions(pretrained: Pretrained, config: TrainConfig, directory: Path) -> Pretrained:
    """Repeat the positions if the run needs more than there are, and asks for them."""
    start = max(pretrained.pad_token_id + 1, 2)
    rows = pretrained.config.max_position_embeddings
    needed, wanted = config.max_seq_length + start, config.model.max_position_embeddings
    if needed <= rows:
        return pretrained
    if wanted is None or wanted < needed:
        raise ConfigurationError(
            f"max_seq_length = {config.max_seq_length}, but the {rows} positions of {directory} are enough for "
            f"{rows - start} tokens (positions start at {start}): lower max_seq_length to {rows - start}, or add "
            f"--model.max_position_embeddings {needed}, which repeats them"
        )
    first = pretrained.pad_token_id + 1
    learned = pretrained.tensors[POSITIONS][first : first + rows - start]
    table = lay_positions(learned, pretrained.pad_token_id, wanted - start)
    note = f"its {rows - start:,} positions are repeated to make {wanted - start:,}"
    return pretrained._replace(
        config=dataclasses.replace(pretrained.config, max_position_embeddings=wanted),
        tensors={**pretrained.tensors, POSITIONS: table},
        notes=[*pretrained.notes, note],
    )
