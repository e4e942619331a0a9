"""A small checkpoint for what comes after pretraining; its weights are random, which is enough to compare by."""

import dataclasses

import pytest

from fastroberta.config import ModelConfig
from fastroberta.corpus.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from fastroberta.hf import read_config, save_huggingface
from fastroberta.model import RobertaForMaskedLM

TEXT = "The capital of France is Paris. Anna gives Ben a book and Ben thanks Anna for the book."


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    config = ModelConfig(
        vocab_size=vocabulary_size(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=34, initializer_range=0.3,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    model.init_weights(1)
    directory = tmp_path_factory.mktemp("checkpoint")
    save_huggingface(model, tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def learner(checkpoint, tmp_path_factory):
    """The checkpoint with small weights and no dropout: it learns in a few steps which word has which tag."""
    config = dataclasses.replace(
        read_config(checkpoint)[0], initializer_range=0.05, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = RobertaForMaskedLM(config)
    model.init_weights(1)
    directory = tmp_path_factory.mktemp("learner")
    save_huggingface(model, load_tokenizer(checkpoint), directory)
    return directory
