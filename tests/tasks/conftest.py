"""A small checkpoint for what comes after pretraining; its weights are random, which is enough to compare by."""

import dataclasses

import pytest
import torch

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
def add_head(checkpoint, tmp_path_factory):
    """A function: name of a head -> directory of the checkpoint with that head, as fine-tuning would leave it."""
    transformers = pytest.importorskip("transformers")
    made = {}

    def add(head, **settings):
        key = (head, repr(settings))
        if key not in made:
            if head == "SequenceClassification" and not settings:
                settings = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
            torch.manual_seed(0)
            model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
                checkpoint, num_hidden_layers=1, **settings
            )
            for name, parameter in model.named_parameters():
                if "classifier" in name or "qa_outputs" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
            made[key] = tmp_path_factory.mktemp(head)
            model.save_pretrained(made[key])
            transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(made[key])
        return made[key]

    return add


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
