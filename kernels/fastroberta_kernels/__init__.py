"""Fused kernels for RoBERTa-like models in PyTorch: one module per operation, imported on first use."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "attention",
    "cross_entropy",
    "embedding",
    "fp8",
    "fp8_mlp",
    "gelu",
    "huggingface",
    "lamb",
    "layer_norm",
    "masking",
    "philox",
    "rotary",
]


def __getattr__(name: str) -> ModuleType:
    # Functions share names with their modules (attention, layer_norm), so the public names here are the modules.
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
