"""The attention kernel behind transformers' attention interface, and padding masks in the form that it takes."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from ._dispatch import NAMESPACE, is_transforming
from ._exchange import Part, draw_seed, may_look
from .attention import HEAD_DIMS, attention, varlen_attention


class KeyPadding(NamedTuple):
    """A padding mask in the form that attention takes. It passes through transformers' encoder in place of the mask."""

    is_token: torch.Tensor  # bool (batch, length)
    lengths: torch.Tensor  # int32 (batch,): tokens of each sequence
    rows: torch.Tensor | None  # int64 (batch * length,): flattened keys, tokens first. None if they are already


def find_attention_obstacle(module: Any) -> str | None:
    config = module.config
    if getattr(config, "is_decoder", False):
        return "a decoder: its attention is causal"
    if config.output_attentions:
        return "config.output_attentions is set, and the kernel has no attention weights"
    if module.attention_head_size > HEAD_DIMS[-1]:
        return f"heads of {module.attention_head_size} exceed the kernel's {HEAD_DIMS[-1]}"
    return None


def is_registered(name: str | None) -> bool:
    """Whether a configuration's attention implementation is one of ours."""
    return (name or "").startswith(NAMESPACE)


def register_attention(impl: str | None) -> str:
    """Register the kernel with transformers, and return its name there."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def make_mask(*args, mask_function, attention_mask=None, **kwargs):
        if mask_function is not bidirectional_mask_function or is_transforming():
            return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
        return None if attention_mask is None else describe_padding(attention_mask)

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        with_weights = kwargs.get("output_attentions")
        if with_weights or module.is_causal or isinstance(attention_mask, torch.Tensor):
            mask = _as_additive_mask(attention_mask, query.dtype)
            eager = sys.modules[type(module).forward.__module__].eager_attention_forward
            function = eager if with_weights else ALL_ATTENTION_FUNCTIONS["sdpa"]
            return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # from (batch, heads, length, head_dim)
        return attend_tokens(q, k, v, attention_mask, kwargs, dropout_p=dropout, scale=scaling, impl=impl), None

    name = NAMESPACE if impl is None else f"{NAMESPACE}_{impl}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, make_mask)
    return name


SELF_ATTENTION = Part("attention", find_obstacle=find_attention_obstacle, register_attention=register_attention)


def describe_padding(is_token: torch.Tensor) -> KeyPadding:
    """bool (batch, length) -> `KeyPadding`. Reads the mask if the host may."""
    lengths = is_token.sum(-1, dtype=torch.int32)
    if may_look(is_token) and bool((is_token[:, :-1] >= is_token[:, 1:]).all()):
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


def attend_tokens(q, k, v, padding, packing: dict[str, Any], *, dropout_p: float, **options):
    """`attention`, or `varlen_attention` where `packing`, what else transformers passes to attention, has bounds.

    (batch, length, heads, head_dim) in and out. `options` are those of both operations.
    """
    options["dropout_p"] = dropout_p
    if dropout_p > 0:
        options["seed"] = draw_seed(q.device)
    if packing.get("cu_seq_lens_q") is not None:
        bounds = packing["cu_seq_lens_q"].to(torch.int32), packing["cu_seq_lens_k"].to(torch.int32)
        longest = int(packing["max_length_q"]), int(packing["max_length_k"])
        tokens = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        return varlen_attention(*tokens, *bounds, *longest, **options).view(q.shape)
    if padding is None:
        return attention(q, k, v, **options)
    if padding.rows is not None:
        k, v = (tensor.flatten(0, 1).index_select(0, padding.rows).view(tensor.shape) for tensor in (k, v))
    return attention(q, k, v, key_lengths=padding.lengths, **options)
