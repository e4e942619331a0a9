"""Parts of MPNet: RoBERTa but for attention, whose learned bias of relative positions the kernel does not take."""

from __future__ import annotations

from collections.abc import Callable

from ._bert import (
    INTERMEDIATE,
    OUTPUT,
    TINY,
    embed,
    find_embedding_obstacle,
    find_roberta_head,
    list_embedding_layers,
)
from ._exchange import Family, Part, draw_dropout, report_only
from ._masked_lm import masked_lm
from .layer_norm import dropout_add_layer_norm


def make_attention_output_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        attended, *weights = self.attn(
            hidden_states, attention_mask, position_bias, output_attentions=output_attentions
        )
        norm = self.LayerNorm
        normalized = dropout_add_layer_norm(
            attended, hidden_states, norm.weight, norm.bias, eps=norm.eps, impl=impl,
            **draw_dropout(self.dropout, hidden_states.device),
        )  # fmt: skip
        return normalized, *weights

    return forward


def make_embeddings_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is None:
            return original(self, input_ids, position_ids, inputs_embeds, **kwargs)
        return embed(self, input_ids, position_ids, impl)

    return forward


MPNET = Family(
    "MPNet",
    "transformers.models.mpnet.modeling_mpnet",
    {
        "MPNetSelfAttention": report_only(
            "attention", "it adds a bias of relative positions, which the kernel does not"
        ),
        "MPNetAttention": Part(
            "layer_norm", make_attention_output_forward, lambda module: (module.dropout, module.LayerNorm)
        ),
        "MPNetOutput": OUTPUT,
        "MPNetIntermediate": INTERMEDIATE,
        "MPNetEmbeddings": Part("embedding", make_embeddings_forward, list_embedding_layers, find_embedding_obstacle),
        "MPNetForMaskedLM": masked_lm(find_roberta_head),
    },
    "MPNetForMaskedLM",
    TINY,
)
