"""What is small enough to train in a test: a model, its gradients, a corpus; and settings as a user types them."""

import torch

from fastroberta.config import ModelConfig
from fastroberta.model import RobertaForMaskedLM
from fastroberta.prepare import main as prepare


def make_model():
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32,
        max_position_embeddings=18,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    model.init_weights(1)
    return model


def set_gradients(model, scale=1.0):
    """Normal numbers, written into the buffer where an optimizer has made one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


def prepare_text(directory, text, vocabulary_size, heldout_fraction=0.1):
    """The directory of the shards of a text, with a tokenizer of its own."""
    source, out = directory / "text.txt", directory / "shards"
    source.write_text(text)
    arguments = [str(source), "--out", str(out), "--train-tokenizer", str(vocabulary_size), "--workers", "1"]
    assert prepare([*arguments, "--heldout-fraction", str(heldout_fraction)]) == 0
    return out


def type_settings(settings, prefix="--"):
    """Settings, with sections inside, as arguments of a program."""
    arguments = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        arguments += type_settings(value, f"{name}.") if isinstance(value, dict) else [f"{name}={value}"]
    return arguments
