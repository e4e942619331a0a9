"""The kernels inside a transformers ModernBERT model.

What is replaced
    attention   rotary positions and attention: `apply_rotary`, then `attention`, with a sliding window in local layers
                (`varlen_attention` where cu_seq_lens are passed)
    layer_norm  both norms of a layer: `layer_norm`, with or without bias. Their input is also the residual, so the sum is
                a tensor of its own and not fused with them
    gelu        the gated activation of the MLP: `geglu`
    mlm_head    head and loss of ModernBertForMaskedLM in training: `bias_gelu`, `layer_norm`, `linear_cross_entropy`
The embeddings (words and a norm: there are no others to add), the final norm and all linear layers stay as they are.

Masks
    transformers makes one mask for the global and one for the local layers. Both are replaced by a `Visibility`, which says
    which keys are padding and how wide the window is. Distances count padding too, so a window needs tokens in their
    places: where padding is on the left or between tokens, and under torch.compile with a padding mask, local layers run
    transformers' sdpa with a full mask. So do calls with a mask of four dimensions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ._dispatch import NAMESPACE
from ._exchange import Family, Part, find_activation_obstacle, find_gelu_form
from ._hf_attention import KeyPadding, attend_tokens, describe_padding
from ._masked_lm import IGNORED_LABEL, Head, masked_lm
from .attention import HEAD_DIMS
from .gelu import geglu
from .layer_norm import layer_norm
from .rotary import apply_rotary

# ---- attention -------------------------------------------------------------------------------------------------------


class Visibility(NamedTuple):
    """Which keys a query sees. It passes through transformers' encoder in place of a mask."""

    padding: KeyPadding | None  # None if no key is padding
    window: int | None  # how far a query sees to each side; None without a bound


def register_attention(impl: str | None) -> str:
    """Register with transformers how masks are made and what attends where the kernel does not. Returns the name there."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def make_mask(*args, attention_mask=None, local_size=None, use_vmap=False, **kwargs):
        if use_vmap:  # somebody's own function of the indices is in the mask
            return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, use_vmap=True, **kwargs)
        padding = None if attention_mask is None else describe_padding(attention_mask)
        return None if padding is None and local_size is None else Visibility(padding, local_size)

    def attend_in_full(module, query, key, value, attention_mask, **kwargs):
        mask = as_additive_mask(attention_mask, query)
        eager = sys.modules[type(module).forward.__module__].eager_attention_forward
        function = eager if kwargs.get("output_attentions") else ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(module, query, key, value, mask, **kwargs)

    name = f"{NAMESPACE}_modernbert" if impl is None else f"{NAMESPACE}_modernbert_{impl}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend_in_full)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, make_mask)
    return name


def as_additive_mask(mask: torch.Tensor | Visibility | None, query: torch.Tensor) -> torch.Tensor | None:
    """The mask in the form that transformers' eager and sdpa functions both take: 0 where a query sees a key."""
    if isinstance(mask, Visibility):
        positions = torch.arange(query.shape[2], device=query.device)
        distance = (positions - positions[:, None]).abs()
        visible = torch.ones_like(distance, dtype=torch.bool) if mask.window is None else distance <= mask.window
        mask = visible if mask.padding is None else visible & mask.padding.is_token[:, None, None, :]
        mask = mask.expand(query.shape[0], 1, -1, -1)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def make_attention_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        if not is_for_kernel(attention_mask) or position_embeddings is None or kwargs.get("output_attentions"):
            return original(self, hidden_states, position_embeddings, attention_mask, **kwargs)
        qkv = self.Wqkv(hidden_states)
        q, k, v = qkv.view(*qkv.shape[:-1], 3, -1, self.head_dim).unbind(-3)
        # transformers repeats the tables for the second half of the dimensions.
        cos, sin = ((t[0] if t.shape[0] == 1 else t)[..., : self.head_dim // 2] for t in position_embeddings)
        q, k = apply_rotary(q, k, cos, sin, impl=impl)
        dropout_p = self.attention_dropout if self.training else 0.0
        context = attend(q, k, v, attention_mask, dropout_p, impl, **kwargs)
        return self.out_drop(self.Wo(context.flatten(-2))), None

    return forward


def is_for_kernel(mask: torch.Tensor | Visibility | None) -> bool:
    if mask is None:
        return True
    return isinstance(mask, Visibility) and (mask.window is None or mask.padding is None or mask.padding.rows is None)


def attend(q, k, v, mask, dropout_p, impl, **packing):
    """(batch, length, heads, head_dim) in and out."""
    padding, window = (None, None) if mask is None else mask
    window_size = (-1, -1) if window is None else (window, window)
    return attend_tokens(q, k, v, padding, packing, dropout_p=dropout_p, impl=impl, window_size=window_size)


def find_attention_obstacle(module: Any) -> str | None:
    if module.config.output_attentions:
        return "config.output_attentions is set, and the kernel has no attention weights"
    if module.head_dim > HEAD_DIMS[-1]:
        return f"heads of {module.head_dim} exceed the kernel's {HEAD_DIMS[-1]}"
    return None


# ---- norms and MLP ---------------------------------------------------------------------------------------------------


def list_norms(module: Any) -> tuple[nn.Module, ...]:
    """The first layer has no norm before attention, since the embeddings end with one."""
    return tuple(norm for norm in (module.attn_norm, module.mlp_norm) if not isinstance(norm, nn.Identity))


def make_layer_forward(original: Callable, impl: str | None) -> Callable:
    def normalize(norm, x):
        return (
            norm(x) if isinstance(norm, nn.Identity) else layer_norm(x, norm.weight, norm.bias, eps=norm.eps, impl=impl)
        )

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        attended, _ = self.attn(
            normalize(self.attn_norm, hidden_states), position_embeddings=position_embeddings,
            attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(normalize(self.mlp_norm, hidden_states))

    return forward


def make_mlp_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, hidden_states):
        activated = geglu(self.Wi(hidden_states), approximate=find_gelu_form(self.act), impl=impl)
        return self.Wo(self.drop(activated))

    return forward


# ---- the model -------------------------------------------------------------------------------------------------------


def find_head(model: Any) -> Head:
    dense, norm, decoder = model.head.dense, model.head.norm, model.decoder
    return Head((model.head,), dense, find_gelu_form(model.head.act), norm, decoder, decoder.bias)


def find_label_obstacle(model: Any) -> str | None:
    ignored = model.config.sparse_pred_ignore_index
    return None if ignored == IGNORED_LABEL else f"its labels are ignored at {ignored}, not {IGNORED_LABEL}"


MODERNBERT = Family(
    "ModernBERT",
    "transformers.models.modernbert.modeling_modernbert",
    {
        "ModernBertAttention": Part(
            "attention", make_attention_forward, find_obstacle=find_attention_obstacle,
            register_attention=register_attention,
        ),
        "ModernBertEncoderLayer": Part("layer_norm", make_layer_forward, list_norms),
        "ModernBertMLP": Part("gelu", make_mlp_forward, find_obstacle=lambda module: find_activation_obstacle(module.act)),
        "ModernBertForMaskedLM": masked_lm(find_head, find_label_obstacle),
    },
    "ModernBertForMaskedLM",
    {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2,
    },
)  # fmt: skip
