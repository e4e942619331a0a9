"""The kernels inside a transformers RoBERTa or BERT model: installed by `apply`, removed by `.revert()`.

What is replaced
    attention   the attention of self-attention layers, through transformers' AttentionInterface: `attention`, or
                `varlen_attention` where cu_seq_lens are passed (packed documents)
    layer_norm  dense + dropout + residual + LayerNorm at the end of both halves of a layer: `dropout_add_layer_norm`
    gelu        dense + GELU in the middle of the MLP: `bias_gelu`
    embedding   the sum of three embeddings, LayerNorm, dropout: `embedding_layer_norm`
    mlm_head    head and loss of ...ForMaskedLM in training: `bias_gelu`, `layer_norm`, `linear_cross_entropy`

How
    Only code is exchanged: a module gets a subclass of its own class, with the same name and another `forward`. Modules,
    parameters, buffers, their names and the state_dict remain the same objects. Optimizers made earlier, save_pretrained,
    deepcopy, torch.nn.DataParallel and gradient checkpointing therefore keep working. Only pickling the model object does
    not, since its class cannot be imported: save the state_dict, or revert first.
    Where a part is not what it should be (a LoRA layer, a forward hook, a quantised linear layer), its original forward
    runs. Parts changed before `apply` are in the report; later changes are noticed at each call.

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
    output_attentions=True are left to transformers' functions.

Loss
    In training mode with labels, only rows with a label pass through the head, logits are never all computed, and the
    output's `logits` is None. Finding those rows waits for the device once if the labels are there. Under torch.compile
    and graph capture all rows are used, and those without a label ignored. The loss is fp32: the mean over labels other
    than -100 (zero if there are none), or, if `num_items_in_batch` is given as transformers' Trainer does, their sum
    divided by it, which makes accumulated gradients exact (transformers' RoBERTa and BERT ignore that argument). In
    evaluation mode the original forward computes loss and logits.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ._dispatch import NAMESPACE
from .attention import HEAD_DIMS, attention, varlen_attention
from .cross_entropy import linear_cross_entropy
from .embedding import embedding_layer_norm
from .gelu import bias_gelu
from .layer_norm import dropout_add_layer_norm, layer_norm

IGNORED_LABEL = -100  # the default of torch.nn.CrossEntropyLoss, which transformers uses
MASKED_LM_ARGUMENTS = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states",
    "encoder_attention_mask", "labels",
)  # fmt: skip
# The hook that transformers puts on word embeddings when checkpointing layers. `_make_embeddings_forward` replaces it.
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
        """Restore the class and forward of every module. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"{self.model_name} with fastroberta_kernels:"]
        for kind, count in self.replaced.items():
            reasons = [f"{number} left alone: {why}" for (of, why), number in self.left_alone.items() if of == kind]
            nothing = [] if count or reasons else ["this model has none"]
            lines.append("; ".join([f"  {kind}: {count} replaced", *reasons, *nothing]))
        return "\n".join(lines)


class KeyPadding(NamedTuple):
    """A padding mask in the form that attention takes. It passes through transformers' encoder in place of the mask."""

    is_token: torch.Tensor  # bool (batch, length)
    lengths: torch.Tensor  # int32 (batch,): tokens of each sequence
    rows: torch.Tensor | None  # int64 (batch * length,): flattened keys, tokens first. None if they are already


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
    """Replace parts of a transformers RoBERTa or BERT model by kernels, in place.

    Args:
        model: such a model, or a module that contains one. Its config object, and so every model that shares it, gets
            another attention implementation.
        attention, layer_norm, gelu, embedding, mlm_head: which kinds of parts to replace; see the top of this file.
        impl: None (Triton on CUDA, else PyTorch), "triton" or "torch".
    Returns:
        A report of what was replaced and what was left alone, with `.revert()`.
    Raises:
        ValueError: the model contains no part of RoBERTa or BERT, or `impl` is unknown.
        ImportError: transformers is not installed.
    """
    if impl not in (None, "triton", "torch"):
        raise ValueError(f"huggingface.apply: impl={impl!r} is unknown; use None, 'triton' or 'torch'")
    wanted = {"attention": attention, "layer_norm": layer_norm, "gelu": gelu, "embedding": embedding,
              "mlm_head": mlm_head}  # fmt: skip
    applied = Applied(type(model).__name__)
    applied.replaced.update({kind: 0 for kind, is_wanted in wanted.items() if is_wanted})
    parts = _list_parts()
    configs: dict[int, Any] = {}
    num_found = 0
    for module in model.modules():
        kind, make_forward = parts.get(_original_class(module).forward, (None, None))
        if kind is None:
            continue
        num_found += 1
        if not wanted[kind]:
            continue
        reason = _reason_against(kind, module)
        if reason is not None:
            applied.left_alone[kind, reason] += 1
            continue
        applied.replaced[kind] += 1
        if make_forward is None:
            configs[id(module.config)] = module.config
        else:
            _exchange_forward(module, make_forward(impl), applied)
    if num_found == 0:
        raise ValueError(
            f"huggingface.apply: {type(model).__name__} holds no part of a transformers RoBERTa or BERT model; "
            "pass such a model"
        )
    for config in configs.values():
        applied._undo.append(functools.partial(setattr, config, "_attn_implementation", config._attn_implementation))
        config._attn_implementation = _register_attention(impl)
    return applied


def _list_parts() -> dict[Callable, tuple[str, Callable | None]]:
    """The known forwards, each with its kind and a function that makes its replacement.

    Keys are functions and not classes: a subclass with its own forward is another module, while one that only adds
    something else, as FSDP's do, is not.
    """
    from transformers.models.bert import modeling_bert as bert
    from transformers.models.roberta import modeling_roberta as roberta

    parts: dict[Callable, tuple[str, Callable | None]] = {}
    for models, prefix in ((bert, "Bert"), (roberta, "Roberta")):
        for name, kind, make_forward in (
            ("SelfAttention", "attention", None),
            ("SelfOutput", "layer_norm", _make_output_forward),
            ("Output", "layer_norm", _make_output_forward),
            ("Intermediate", "gelu", _make_intermediate_forward),
            ("Embeddings", "embedding", _make_embeddings_forward),
            ("ForMaskedLM", "mlm_head", _make_masked_lm_forward),
        ):
            parts[getattr(models, prefix + name).forward] = (kind, make_forward)
    return parts


def _reason_against(kind: str, module: Any) -> str | None:
    """Why a module cannot be replaced, or None if it can."""
    if kind == "attention":
        config = module.config
        if (config._attn_implementation or "").startswith(NAMESPACE):
            return "replaced before"
        if config.is_decoder:
            return "a decoder: its attention is causal"
        if config.output_attentions:
            return "config.output_attentions is set, and the kernel has no attention weights"
        if module.attention_head_size > HEAD_DIMS[-1]:
            return f"heads of {module.attention_head_size} exceed the kernel's {HEAD_DIMS[-1]}"
        return None
    if _is_replaced(module):
        return "replaced before"
    if "forward" in vars(module):
        return "its forward was exchanged by something else"
    if kind == "gelu" or (kind == "mlm_head" and hasattr(module, "cls")):
        activation = module.intermediate_act_fn if kind == "gelu" else module.cls.predictions.transform.transform_act_fn
        if _gelu_form(activation) is None:
            return f"its activation {_name(activation)} is not GELU"
    if kind == "embedding" and not _has_known_positions(module):
        return "its word and position embeddings differ in padding_idx"
    inner = _list_inner(kind, module)
    changed = [_name(part) for part in inner if not _is_plain(part)]
    return f"{changed[0]} is no plain layer, or has hooks" if changed else None


def _list_inner(kind: str, module: Any) -> tuple[nn.Module, ...]:
    """The layers whose parameters the replacement uses without calling the layers."""
    if kind == "layer_norm":
        return module.dense, module.dropout, module.LayerNorm
    if kind == "gelu":
        return (module.dense,)
    if kind == "embedding":
        return (module.word_embeddings, module.position_embeddings, module.token_type_embeddings, module.LayerNorm,
                module.dropout)  # fmt: skip
    head = _find_head(module)
    return head.dense, head.norm, head.decoder


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the layer does just what its class does."""
    return (
        type(module) in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding)
        and "forward" not in vars(module)
        and not _has_hooks(module)
        and not (isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse))
    )


def _has_hooks(module: nn.Module) -> bool:
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(getattr(hook, "__name__", "") != INPUT_GRADIENT_HOOK for hook in module._forward_hooks.values())


def _name(function: Any) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))


def _gelu_form(activation: Any) -> str | None:
    """ "none" or "tanh" for one of transformers' GELU modules, None for anything else."""
    activation_class = type(activation)
    is_known = activation_class.__module__ == "transformers.activations"
    return GELU_FORMS.get(activation_class.__name__) if is_known else None


# ---- exchanging a forward --------------------------------------------------------------------------------------------


def _is_replaced(module: nn.Module) -> bool:
    return "_replaced_class" in vars(type(module))


def _original_class(module: Any) -> type[nn.Module]:
    return type(module)._replaced_class if _is_replaced(module) else type(module)


def _exchange_forward(module: nn.Module, forward: Callable, applied: Applied) -> None:
    """Give `module` a subclass of its class whose forward is `forward(original, module, ...)`.

    Not `module.forward = ...`: torch.nn.DataParallel would copy a method that is bound to the first device's module.
    """
    original = type(module)

    @functools.wraps(original.forward)
    def replacement(self, *args, **kwargs):
        return forward(original.forward, self, *args, **kwargs)

    # transformers finds things by the class's module and name.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    make_class: Any = type(original)
    module.__class__ = make_class(
        original.__name__, (original,), {**names, "forward": replacement, "_replaced_class": original}
    )
    applied._undo.append(functools.partial(setattr, module, "__class__", original))


def _draw_dropout(dropout: nn.Dropout, device: torch.device) -> dict[str, Any]:
    """Arguments p and seed of a dropout site."""
    if not dropout.training or dropout.p == 0:
        return {"p": 0.0, "seed": None}
    return {"p": dropout.p, "seed": _draw_seed(device)}


def _draw_seed(device: torch.device) -> torch.Tensor:
    # Key and first row. Any first row will do, and a random one saves the launch that would zero it.
    return torch.randint(1 << 62, (2,), device=device)


def _may_look(tensor: torch.Tensor) -> bool:
    """Whether the host may read values of a tensor."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


# ---- the parts -------------------------------------------------------------------------------------------------------


def _make_output_forward(impl: str | None) -> Callable:
    def forward(original, self, hidden_states, input_tensor):
        if not all(map(_is_plain, _list_inner("layer_norm", self))):
            return original(self, hidden_states, input_tensor)
        return dropout_add_layer_norm(
            F.linear(hidden_states, self.dense.weight), input_tensor, self.LayerNorm.weight, self.LayerNorm.bias,
            eps=self.LayerNorm.eps, x_bias=self.dense.bias, impl=impl,
            **_draw_dropout(self.dropout, hidden_states.device),
        )  # fmt: skip

    return forward


def _make_intermediate_forward(impl: str | None) -> Callable:
    def forward(original, self, hidden_states):
        form = _gelu_form(self.intermediate_act_fn)
        if form is None or not _is_plain(self.dense):
            return original(self, hidden_states)
        product = F.linear(hidden_states, self.dense.weight)
        return bias_gelu(product, self.dense.bias, approximate=form, impl=impl)

    return forward


def _has_known_positions(self: Any) -> bool:
    """BERT counts positions from 0. RoBERTa counts from its padding id, which is the position of padding."""
    return self.position_embeddings.padding_idx in (None, self.word_embeddings.padding_idx)


def _make_embeddings_forward(impl: str | None) -> Callable:
    def forward(original, self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None,
                past_key_values_length=0):  # fmt: skip
        is_known = _has_known_positions(self) and all(map(_is_plain, _list_inner("embedding", self)))
        if input_ids is None or past_key_values_length or not is_known:
            return original(self, input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        embedded = embedding_layer_norm(
            input_ids.long(), self.word_embeddings.weight, self.position_embeddings.weight,
            self.token_type_embeddings.weight, self.LayerNorm.weight, self.LayerNorm.bias,
            token_type_ids=None if token_type_ids is None else token_type_ids.long().expand(input_ids.shape),
            position_ids=None if position_ids is None else position_ids.long(),
            padding_idx=self.word_embeddings.padding_idx,
            padding_positions=self.position_embeddings.padding_idx is not None,
            eps=self.LayerNorm.eps, impl=impl, **_draw_dropout(self.dropout, input_ids.device),
        )  # fmt: skip
        if self.word_embeddings._forward_hooks and torch.is_grad_enabled() and not embedded.requires_grad:
            embedded.requires_grad_(True)
        return embedded

    return forward


class _Head(NamedTuple):
    """The layers of a masked-language-model head."""

    holder: nn.Module
    dense: nn.Module
    form: str | None
    norm: nn.Module
    decoder: nn.Module


def _find_head(model: Any) -> _Head:
    if hasattr(model, "lm_head"):  # RoBERTa, whose head always uses the exact GELU
        head = model.lm_head
        return _Head(head, head.dense, "none", head.layer_norm, head.decoder)
    head = model.cls.predictions
    transform = head.transform
    return _Head(head, transform.dense, _gelu_form(transform.transform_act_fn), transform.LayerNorm, head.decoder)


def _make_masked_lm_forward(impl: str | None) -> Callable:
    from transformers.modeling_outputs import MaskedLMOutput
    from transformers.utils.generic import can_return_tuple

    @can_return_tuple
    def forward_training(self, labels, num_items_in_batch=None, **kwargs):
        outputs = self.base_model(**kwargs, return_dict=True)
        hidden, labels = outputs.last_hidden_state.flatten(0, 1), labels.flatten()
        if _may_look(labels):
            rows = (labels != IGNORED_LABEL).nonzero()[:, 0]
            labels = labels[rows]
            hidden = hidden.index_select(0, rows.to(hidden.device))
        head = _find_head(self)
        activated = bias_gelu(F.linear(hidden, head.dense.weight), head.dense.bias, approximate=head.form, impl=impl)
        loss = linear_cross_entropy(
            layer_norm(activated, head.norm.weight, head.norm.bias, eps=head.norm.eps, impl=impl),
            head.decoder.weight, head.decoder.bias, labels.to(hidden.device), ignore_index=IGNORED_LABEL,
            reduction="mean" if num_items_in_batch is None else "sum", impl=impl,
        ).loss  # fmt: skip
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return MaskedLMOutput(
            loss=loss if num_items_in_batch is None else loss / num_items_in_batch,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def forward(original, self, *args, **kwargs):
        arguments = dict(zip(MASKED_LM_ARGUMENTS, args)) | kwargs
        head = _find_head(self)
        is_known = head.form is not None and all(map(_is_plain, _list_inner("mlm_head", self)))
        if not self.training or arguments.get("labels") is None or not is_known or _has_hooks(head.holder):
            return original(self, *args, **kwargs)
        return forward_training(self, **arguments)

    return forward


# ---- attention -------------------------------------------------------------------------------------------------------


def _register_attention(impl: str | None) -> str:
    """Register the kernel with transformers, and return its name there."""
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        bidirectional_mask_function,
        sdpa_mask,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def make_mask(*args, mask_function, attention_mask=None, **kwargs):
        if mask_function is not bidirectional_mask_function:
            return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
        return None if attention_mask is None else _describe_padding(attention_mask)

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        with_weights = kwargs.get("output_attentions")
        if with_weights or module.is_causal or isinstance(attention_mask, torch.Tensor):
            mask = _as_additive_mask(attention_mask, query.dtype)
            eager = sys.modules[type(module).forward.__module__].eager_attention_forward
            function = eager if with_weights else ALL_ATTENTION_FUNCTIONS["sdpa"]
            return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        return _attend(query, key, value, attention_mask, scaling, dropout, impl, **kwargs), None

    name = NAMESPACE if impl is None else f"{NAMESPACE}_{impl}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, make_mask)
    return name


def _describe_padding(is_token: torch.Tensor) -> KeyPadding:
    """bool (batch, length) -> `KeyPadding`. Reads the mask if the host may."""
    lengths = is_token.sum(-1, dtype=torch.int32)
    if _may_look(is_token) and bool((is_token[:, :-1] >= is_token[:, 1:]).all()):
        return KeyPadding(is_token, lengths, None)
    order = torch.argsort(is_token.to(torch.uint8), dim=-1, descending=True, stable=True)
    first_rows = torch.arange(is_token.shape[0], device=is_token.device)[:, None] * is_token.shape[1]
    return KeyPadding(is_token, lengths, (first_rows + order).flatten())


def _as_additive_mask(mask: torch.Tensor | KeyPadding | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask in the form that transformers' eager and sdpa functions both take: 0 where a query sees a key."""
    if isinstance(mask, KeyPadding):
        mask = mask.is_token[:, None, None, :]
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _attend(query, key, value, padding, scale, dropout_p, impl, cu_seq_lens_q=None, cu_seq_lens_k=None,
            max_length_q=None, max_length_k=None, **_):  # fmt: skip
    """transformers' (batch, heads, length, head_dim) -> (batch, length, heads, head_dim)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    options = {"dropout_p": dropout_p, "scale": scale, "impl": impl}
    if dropout_p > 0:
        options["seed"] = _draw_seed(q.device)
    if cu_seq_lens_q is not None:
        bounds = cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32), int(max_length_q), int(max_length_k)
        return varlen_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *bounds, **options).view(q.shape)
    if padding is None:
        return attention(q, k, v, **options)
    if padding.rows is not None:
        k, v = (tensor.flatten(0, 1).index_select(0, padding.rows).view(tensor.shape) for tensor in (k, v))
    return attention(q, k, v, key_lengths=padding.lengths, **options)
