"""The model that a new run starts with: random weights, or those of a Hugging Face directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..checkpoint import verify_directory
from ..config import TrainConfig
from ..corpus.manifest import Manifest
from ..corpus.tokenizer import load_tokenizer, tokenizer_hash
from ..errors import ConfigurationError
from ..hf import load_huggingface
from ..model import RobertaForMaskedLM


def build_model(config: TrainConfig, manifest: Manifest) -> RobertaForMaskedLM:
    """The model as configured, with its initial weights, in fp32 on the CPU.

    What the configuration leaves to the data or to `init_from` is set in `config.model`.

    Raises:
        CheckpointError: `init_from` is damaged.
        ConfigurationError: the configuration, the data and `init_from` do not fit together.
    """
    pad_token_id = manifest.special_token_ids["pad_token_id"]
    if config.init_from is not None:
        return _load_initial_model(config, manifest, Path(config.init_from))
    given = config.model.vocab_size
    if given is not None and given < manifest.vocab_size:
        raise ConfigurationError(
            f"model.vocab_size: {given}, but the tokenizer of {manifest.directory} has {manifest.vocab_size} ids; leave it "
            "null"
        )
    config.model.vocab_size = given or manifest.vocab_size
    model = RobertaForMaskedLM(config.model, pad_token_id, config.gradient_checkpointing)
    model.init_weights(config.seed)
    return model


def _load_initial_model(config: TrainConfig, manifest: Manifest, directory: Path) -> RobertaForMaskedLM:
    verify_directory(directory)
    loaded = load_huggingface(directory)
    if tokenizer_hash(load_tokenizer(directory)) != manifest.tokenizer_sha256:
        raise ConfigurationError(
            f"init_from: {directory} has another tokenizer than {manifest.directory}; prepare the data with "
            f"--tokenizer {directory}"
        )
    longest = loaded.config.max_position_embeddings - 2
    if config.max_seq_length > longest:
        raise ConfigurationError(
            f"max_seq_length = {config.max_seq_length}, but the {longest + 2} positions of {directory} are enough "
            f"for {longest} tokens (positions start at 2): lower max_seq_length to {longest}, or start from a model "
            "with more positions"
        )
    # Sizes come from the checkpoint, dropout is a choice of this run.
    config.model = dataclasses.replace(
        loaded.config,
        hidden_dropout_prob=config.model.hidden_dropout_prob,
        attention_probs_dropout_prob=config.model.attention_probs_dropout_prob,
    )
    model = RobertaForMaskedLM(config.model, loaded.pad_token_id, config.gradient_checkpointing)
    model.load_state_dict(loaded.state_dict())
    return model
