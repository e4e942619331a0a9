"""The kernels inside transformers' encoders: installed by `apply`, removed by `.revert()`.

What is replaced
    attention   the attention of self-attention layers, through transformers' attention interface: `attention`, or
                `varlen_attention` where cu_seq_lens are passed (packed documents)
    layer_norm  dropout + residual + LayerNorm at the end of both halves of a layer, with the bias of the linear layer
                before it: `dropout_add_layer_norm`
    gelu        dense + GELU in the middle of the MLP: `bias_gelu`
    embedding   the sum of the embeddings, LayerNorm, dropout: `embedding_layer_norm`
    mlm_head    head and loss of ...ForMaskedLM in training: `bias_gelu`, `layer_norm`, `linear_cross_entropy`
Which models have which of them is in the table of README.md. To add a model, describe it as a `Family` in a file of its own
and name it in FAMILIES.

How
    Only code is exchanged: a module gets a subclass of its own class, with the same name and another `forward`. Modules,
    parameters, buffers, their names and the state_dict remain the same objects. Optimizers made earlier, save_pretrained,
    deepcopy, DDP, FSDP, torch.nn.DataParallel and gradient checkpointing therefore keep working. Only pickling the model
    object does not, since its class cannot be imported: save the state_dict, or revert first.
    Where a part is not what it should be (a LoRA layer, a forward hook, a quantised linear layer), its original forward
    runs. Parts changed before `apply` are in the report; later changes are noticed at each call.

Other versions of transformers
    The parts are known as they are in version TESTED. With any other version, `apply` first computes loss and gradients of
    a model with one tiny layer, with and without each kind of part. A kind that makes a difference is left alone, and the
    report names both versions.

Dropout
    In training mode, each site draws a seed of two int64 from torch's generator of the device in every forward
    (`torch.randint`, no synchronisation). So torch.manual_seed makes runs reproducible, gradient checkpointing, which
    restores the generator's state, repeats the same dropout, and replaying a CUDA graph draws new masks. Probabilities are
    rounded to multiples of 1/256 (see `philox`). In evaluation mode nothing is drawn.

Masks
    Attention does not depend on the order of keys. A padding mask (batch, length) becomes the number of keys of each
    sequence if tokens come first. Otherwise (padding on the left, gaps), keys and values are first reordered. Checking
    that waits for the device once per forward, as transformers' own sdpa does. Under torch.compile and during CUDA graph
    capture there is no check, and keys are always reordered. Calls with a mask of four dimensions or with
    output_attentions=True are left to transformers' functions, and so are masks under torch.func.

Loss
    In training mode with labels, only rows with a label pass through the head, logits are never all computed, and the
    output's `logits` is None. Finding those rows waits for the device once if the labels are there. Under torch.compile,
    torch.func and graph capture all rows are used, and those without a label ignored. The loss is fp32: the mean over
    labels other than -100 (zero if there are none), or, if `num_items_in_batch` is given as transformers' Trainer does,
    their sum divided by it, which makes accumulated gradients exact (these models of transformers ignore that argument).
    In evaluation mode the original forward computes loss and logits.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ._bert import BERT_FAMILIES
from ._distilbert import DISTILBERT
from ._esm import ESM
from ._exchange import KINDS, Family, Part, exchange_forward, find_obstacle, find_original_forward, find_replacement
from ._hf_attention import is_registered
from ._modernbert import MODERNBERT
from ._mpnet import MPNET

FAMILIES: tuple[Family, ...] = (*BERT_FAMILIES, DISTILBERT, MPNET, ESM, MODERNBERT)
TESTED = "5.23.0"  # of transformers


@dataclass
class Applied:
    """A report of what `apply` did, to be printed.

    Attributes:
        replaced: the number of replaced modules of each kind.
        left_alone: the number of modules that kept their own forward, for each (kind, reason).
    """

    model_name: str
    replaced: Counter[str] = field(default_factory=Counter)
    left_alone: Counter[tuple[str, str]] = field(default_factory=Counter)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Restore the forward of every module. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"{self.model_name} with fastroberta_kernels:"]
        for kind, count in self.replaced.items():
            found = [(number, why) for (of, why), number in self.left_alone.items() if of == kind]
            reasons = [f"{number} left alone: {why}" if number else why for number, why in found]
            nothing = [] if count or reasons else ["this model has none"]
            lines.append("; ".join([f"  {kind}: {count} replaced", *reasons, *nothing]))
        return "\n".join(lines)


def apply(
    model: nn.Module,
    *,
    attention: bool = True,
    layer_norm: bool = True,
    gelu: bool = True,
    embedding: bool = True,
    mlm_head: bool = True,
    impl: str | None = None,
) -> Applied:
    """Replace parts of a transformers model by kernels, in place.

    Args:
        model: a model of one of FAMILIES, or a module that contains one, such as a SentenceTransformer or a PeftModel. Its
            config object, and so every model that shares it, gets another attention implementation.
        attention, layer_norm, gelu, embedding, mlm_head: which kinds of parts to replace; see the top of this file.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        A report of what was replaced and what was left alone, with `.revert()`. What was replaced before stays as it is.
    Raises:
        ValueError: the model contains no part of a known model, or `impl` is unknown.
        ImportError: transformers is not installed.
    """
    import transformers

    if impl not in (None, "triton", "torch"):
        raise ValueError(f"huggingface.apply: impl={impl!r} is unknown; use None, 'triton' or 'torch'")
    wanted = dict(zip(KINDS, (attention, layer_norm, gelu, embedding, mlm_head)))
    kinds = [kind for kind in KINDS if wanted[kind]]
    changed = {}
    if transformers.__version__ != TESTED:
        reason = f"transformers {transformers.__version__} computes it differently from {TESTED}, the version tested"
        changed = {
            (family, kind): reason
            for family in _find_families(model)
            for kind in kinds
            if not _computes_the_same(family, kind)
        }
    return _replace(model, kinds, impl, changed)


def _replace(model: nn.Module, kinds: list[str], impl: str | None, changed: dict[tuple[Family, str], str]) -> Applied:
    applied = Applied(type(model).__name__)
    applied.replaced.update(dict.fromkeys(kinds, 0))
    applied.left_alone.update({(kind, reason): 0 for (_, kind), reason in changed.items()})
    parts = _list_parts()
    configs: dict[int, tuple[Any, Part]] = {}
    num_found = 0
    for module in model.modules():
        family, part = parts.get(find_original_forward(module), (None, None))
        if part is None:
            continue
        num_found += 1
        if part.kind not in kinds:
            continue
        reason = changed.get((family, part.kind)) or _find_reason_against(part, module)
        if reason is not None:
            applied.left_alone[part.kind, reason] += 1
            continue
        applied.replaced[part.kind] += 1
        if part.register_attention:
            configs[id(module.config)] = module.config, part
        if part.make_forward:
            applied._undo.append(exchange_forward(module, part, impl))
    if num_found == 0:
        raise ValueError(
            f"huggingface.apply: {type(model).__name__} holds no part of a model of transformers that it knows; pass "
            f"one of {', '.join(family.name for family in FAMILIES)}"
        )
    for config, part in configs.values():
        applied._undo.append(functools.partial(setattr, config, "_attn_implementation", config._attn_implementation))
        config._attn_implementation = part.register_attention(impl)
    return applied


def _list_parts() -> dict[Callable, tuple[Family, Part]]:
    """The known forwards of the modeling files that are imported.

    Keys are functions and not classes: a subclass with its own forward is another module, while one that only adds
    something else, as FSDP's do, is not.
    """
    parts = {}
    for family in FAMILIES:
        modeling = sys.modules.get(family.modeling)
        for name, part in family.parts.items():
            if hasattr(modeling, name):
                parts[getattr(modeling, name).forward] = family, part
    return parts


def _find_reason_against(part: Part, module: Any) -> str | None:
    """Why a module cannot be replaced, or None if it can."""
    if find_replacement(module) or (part.register_attention and is_registered(module.config._attn_implementation)):
        return "replaced before"
    if part.make_forward and "forward" in vars(module):
        return "its forward was exchanged by something else"
    return find_obstacle(part, module)


# ---- other versions of transformers ----------------------------------------------------------------------------------


def _find_families(model: nn.Module) -> list[Family]:
    """The families of which `model` contains a module."""
    files = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return [family for family in FAMILIES if family.modeling in files]


def _computes_the_same(family: Family, kind: str) -> bool:
    """Whether a tiny model of the family has the same loss and gradients with and without a kind of part."""
    results = []
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            torch.manual_seed(0)
            model = _make_tiny_model(family)
            ids = torch.arange(3, 13).view(2, 5)
            mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
            for kinds in ([], [kind]):
                applied = _replace(model, kinds, "torch", {})
                model.zero_grad()
                loss = model(input_ids=ids, attention_mask=mask, labels=torch.where(mask == 1, ids, -100)).loss
                loss.backward()
                gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
                results.append(torch.cat([loss.detach()[None], *gradients]))
                applied.revert()
            can_replace = any(part.kind == kind and part.replaces for part in family.parts.values())
            is_replaced = applied.replaced[kind] > 0 or not can_replace
            return is_replaced and torch.allclose(results[0], results[1], rtol=1e-3, atol=1e-4)
    except Exception:  # whatever an unknown version may raise
        return False


def _make_tiny_model(family: Family) -> Any:
    """A masked language model of the family with one small layer and random parameters, without dropout."""
    model_class = getattr(sys.modules[family.modeling], family.masked_lm)
    model = model_class(model_class.config_class(**family.tiny)).float().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
