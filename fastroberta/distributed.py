"""Devices and ranks: where this process computes."""

from __future__ import annotations

import torch

from .errors import ConfigurationError


def select_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for.

    Raises:
        ConfigurationError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device: cuda is asked for, PyTorch sees no GPU; take --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
