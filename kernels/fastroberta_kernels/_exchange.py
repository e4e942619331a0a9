"""Parts of other people's models: what may be replaced, how a forward is exchanged, and how it is restored.

A module gets a subclass of its own class, with the same name and another `forward`. Modules, parameters, buffers, their
names and the state_dict remain the same objects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ._dispatch import is_transforming

KINDS = ("attention", "layer_norm", "gelu", "embedding", "mlm_head")
# The hook that transformers puts on word embeddings when it checkpoints layers. The embeddings' forward replaces it.
INPUT_GRADIENT_HOOK = "make_inputs_require_grads"
# Class in transformers.activations -> form of GELU.
GELU_FORMS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "AccurateGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",  # the name of GELUTanh until 2025
}


def _find_nothing(module: Any) -> None:
    return None


class Part(NamedTuple):
    """How the modules of one class are replaced. A part with neither a forward nor an implementation is only reported.

    Attributes:
        kind: one of KINDS.
        make_forward: given the original forward and `impl`, returns the new forward, a function of the module and its
            arguments.
        list_layers: the layers whose parameters the new forward uses without calling them.
        find_obstacle: why this module cannot be replaced, or None. It is asked again at each call.
        register_attention: given `impl`, registers an implementation of attention with transformers and returns its name,
            which the model's configuration gets.
    """

    kind: str
    make_forward: Callable[[Callable, str | None], Callable] | None = None
    list_layers: Callable[[Any], tuple[nn.Module, ...]] = lambda module: ()
    find_obstacle: Callable[[Any], str | None] = _find_nothing
    register_attention: Callable[[str | None], str] | None = None

    @property
    def replaces(self) -> bool:
        return self.make_forward is not None or self.register_attention is not None


def report_only(kind: str, reason: str) -> Part:
    """A part that the kernels cannot replace."""
    return Part(kind, find_obstacle=lambda module: reason)


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of model.

    Attributes:
        name: as people call it.
        modeling: the module of transformers that defines its classes.
        parts: the parts of the model by the name of their class.
        masked_lm: the class of its masked language model.
        tiny: settings of a configuration with one small layer, on which `apply` tries an unknown version of transformers.
    """

    name: str
    modeling: str
    parts: dict[str, Part]
    masked_lm: str
    tiny: dict[str, Any] = field(default_factory=dict)


# ---- what may be replaced --------------------------------------------------------------------------------------------


def find_obstacle(part: Part, module: Any) -> str | None:
    """Why a module cannot be replaced, or None if it can."""
    reason = part.find_obstacle(module)
    if reason is not None:
        return reason
    for layer in part.list_layers(module):
        if not is_plain(layer):
            return f"{name_of(layer)} is no plain layer, or has hooks"
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether calling the layer does just what its class does."""
    return (
        type(module) in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding)
        and "forward" not in vars(module)
        and not has_hooks(module)
        and not (isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse))
    )


def has_hooks(module: nn.Module) -> bool:
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(getattr(hook, "__name__", "") != INPUT_GRADIENT_HOOK for hook in module._forward_hooks.values())


def name_of(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))


def find_gelu_form(activation: Any) -> str | None:
    """ "none" or "tanh" for one of transformers' GELU modules, None for anything else."""
    activation_class = type(activation)
    is_known = activation_class.__module__ == "transformers.activations"
    return GELU_FORMS.get(activation_class.__name__) if is_known else None


def find_activation_obstacle(activation: Any) -> str | None:
    return None if find_gelu_form(activation) else f"its activation {name_of(activation)} is not GELU"


# ---- exchanging a forward --------------------------------------------------------------------------------------------


def find_replacement(module: nn.Module) -> type | None:
    """The class that `exchange_forward` gave to a module, perhaps below one that FSDP gave it later; None without one."""
    return next((base for base in type(module).__mro__ if "_replaced_class" in vars(base)), None)


def find_original_forward(module: nn.Module) -> Callable:
    """The forward that a module has without its replacement."""
    replacement: Any = find_replacement(module)
    return type(module).forward if replacement is None else replacement._replaced_class.forward


def exchange_forward(module: nn.Module, part: Part, impl: str | None) -> Callable[[], None]:
    """Give `module` a subclass of its class with the part's forward. Returns the function that restores it.

    Not `module.forward = ...`: torch.nn.DataParallel would copy a method that is bound to the first device's module.
    """
    original = type(module)
    original_forward = original.forward
    forward = part.make_forward(original_forward, impl)

    @functools.wraps(original_forward)
    def forward_if_plain(self, *args, **kwargs):
        chosen = forward if find_obstacle(part, self) is None else original_forward
        return chosen(self, *args, **kwargs)

    # transformers finds things by the class's module and name.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    make_class: Any = type(original)
    replacement = make_class(
        original.__name__, (original,), {**names, "forward": forward_if_plain, "_replaced_class": original}
    )
    module.__class__ = replacement

    def restore() -> None:
        if type(module) is replacement:
            module.__class__ = original
        else:  # FSDP has put a class of its own on top, which stays
            del replacement.forward, replacement._replaced_class

    return restore


# ---- inside the new forwards -----------------------------------------------------------------------------------------


def draw_dropout(dropout: nn.Dropout, device: torch.device) -> dict[str, Any]:
    """Arguments p and seed of a dropout site."""
    if not dropout.training or dropout.p == 0:
        return {"p": 0.0, "seed": None}
    return {"p": dropout.p, "seed": draw_seed(device)}


def draw_seed(device: torch.device) -> torch.Tensor:
    # Key and first row. Any first row will do, and a random one saves the launch that would zero it.
    return torch.randint(1 << 62, (2,), device=device)


def may_look(tensor: torch.Tensor) -> bool:
    """Whether the host may read values of a tensor."""
    if torch.compiler.is_compiling() or is_transforming():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
