"""Parts of DistilBERT, which keeps the LayerNorms of a layer, and their residuals, in the layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._bert import embed, find_embedding_obstacle, list_embedding_layers
from ._exchange import (
    Family,
    Part,
    draw_dropout,
    find_activation_obstacle,
    find_gelu_form,
    find_obstacle,
    find_replacement,
    has_hooks,
)
from ._hf_attention import SELF_ATTENTION
from ._masked_lm import Head, masked_lm
from .gelu import bias_gelu
from .layer_norm import dropout_add_layer_norm


def expand(ffn: Any, hidden_states: torch.Tensor, impl: str | None) -> torch.Tensor:
    """The first layer of the MLP and GELU in one."""
    product = F.linear(hidden_states, ffn.lin1.weight)
    return bias_gelu(product, ffn.lin1.bias, approximate=find_gelu_form(ffn.activation), impl=impl)


def make_ffn_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, input):
        return self.dropout(self.lin2(expand(self, input, impl)))

    return forward


def find_ffn_obstacle(module: Any) -> str | None:
    if module.chunk_size_feed_forward:
        return "it computes in chunks"
    return find_activation_obstacle(module.activation)


FFN = Part("gelu", make_ffn_forward, lambda module: (module.lin1,), find_ffn_obstacle)


def make_block_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        norm = self.sa_layer_norm
        hidden_states = dropout_add_layer_norm(attended, hidden_states, norm.weight, norm.bias, eps=norm.eps, impl=impl)
        ffn, norm = self.ffn, self.output_layer_norm
        is_fused = find_replacement(ffn) is not None and find_obstacle(FFN, ffn) is None
        expanded = expand(ffn, hidden_states, impl) if is_fused else ffn.activation(ffn.lin1(hidden_states))
        return dropout_add_layer_norm(
            F.linear(expanded, ffn.lin2.weight), hidden_states, norm.weight, norm.bias, eps=norm.eps,
            x_bias=ffn.lin2.bias, impl=impl, **draw_dropout(ffn.dropout, hidden_states.device),
        )  # fmt: skip

    return forward


def list_block_layers(module: Any) -> tuple[nn.Module, ...]:
    return module.sa_layer_norm, module.ffn.lin2, module.ffn.dropout, module.output_layer_norm


def find_block_obstacle(module: Any) -> str | None:
    """The block passes by its MLP's own forward."""
    if has_hooks(module.ffn) or "forward" in vars(module.ffn):
        return "its MLP has hooks, or another forward"
    return "its MLP computes in chunks" if module.ffn.chunk_size_feed_forward else None


BLOCK = Part("layer_norm", make_block_forward, list_block_layers, find_block_obstacle)


def make_embeddings_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, input_ids, inputs_embeds=None, position_ids=None):
        if input_ids is None:
            return original(self, input_ids, inputs_embeds, position_ids)
        return embed(self, input_ids, position_ids, impl)

    return forward


def find_head(model: Any) -> Head:
    decoder = model.vocab_projector
    return Head(
        (), model.vocab_transform, find_gelu_form(model.activation), model.vocab_layer_norm, decoder, decoder.bias
    )


def find_loss_obstacle(model: Any) -> str | None:
    loss = model.mlm_loss_fct
    is_default = type(loss) is nn.CrossEntropyLoss and (
        loss.weight is None and (loss.ignore_index, loss.reduction, loss.label_smoothing) == (-100, "mean", 0.0)
    )
    return None if is_default else "its mlm_loss_fct was changed"


DISTILBERT = Family(
    "DistilBERT",
    "transformers.models.distilbert.modeling_distilbert",
    {
        "DistilBertSelfAttention": SELF_ATTENTION,
        "TransformerBlock": BLOCK,
        "FFN": FFN,
        "Embeddings": Part("embedding", make_embeddings_forward, list_embedding_layers, find_embedding_obstacle),
        "DistilBertForMaskedLM": masked_lm(find_head, find_loss_obstacle),
    },
    "DistilBertForMaskedLM",
    {"vocab_size": 16, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "max_position_embeddings": 16,
     "pad_token_id": 1},
)  # fmt: skip
