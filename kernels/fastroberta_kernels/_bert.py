"""Parts of BERT, and of the models whose layers are its own: RoBERTa, XLM-RoBERTa, CamemBERT, data2vec, ELECTRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._exchange import Family, Part, draw_dropout, find_activation_obstacle, find_gelu_form
from ._hf_attention import SELF_ATTENTION
from ._masked_lm import Head, masked_lm
from .embedding import embedding_layer_norm
from .gelu import bias_gelu
from .layer_norm import dropout_add_layer_norm

# ---- the end of both halves of a layer: dense, dropout, residual, LayerNorm ------------------------------------------


def make_output_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, hidden_states, input_tensor):
        return dropout_add_layer_norm(
            F.linear(hidden_states, self.dense.weight), input_tensor, self.LayerNorm.weight, self.LayerNorm.bias,
            eps=self.LayerNorm.eps, x_bias=self.dense.bias, impl=impl,
            **draw_dropout(self.dropout, hidden_states.device),
        )  # fmt: skip

    return forward


OUTPUT = Part("layer_norm", make_output_forward, lambda module: (module.dense, module.dropout, module.LayerNorm))

# ---- the middle of the MLP: dense, GELU ------------------------------------------------------------------------------


def make_intermediate_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, hidden_states):
        product = F.linear(hidden_states, self.dense.weight)
        return bias_gelu(product, self.dense.bias, approximate=find_gelu_form(self.intermediate_act_fn), impl=impl)

    return forward


INTERMEDIATE = Part(
    "gelu", make_intermediate_forward, lambda module: (module.dense,),
    lambda module: find_activation_obstacle(module.intermediate_act_fn),
)  # fmt: skip

# ---- embeddings ------------------------------------------------------------------------------------------------------


def list_embedding_layers(module: Any) -> tuple[nn.Module, ...]:
    types = getattr(module, "token_type_embeddings", None)
    tables = module.word_embeddings, module.position_embeddings, *(() if types is None else (types,))
    return *tables, module.LayerNorm, module.dropout


def find_embedding_obstacle(module: Any) -> str | None:
    """BERT counts positions from 0. RoBERTa counts from its padding id, which is the position of padding."""
    if module.position_embeddings.padding_idx in (None, module.word_embeddings.padding_idx):
        return None
    return "its word and position embeddings differ in padding_idx"


def embed(
    module: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    impl: str | None,
    token_type_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Word, position and, where the module has them, token type embeddings, LayerNorm and dropout."""
    types = getattr(module, "token_type_embeddings", None)
    embedded = embedding_layer_norm(
        input_ids.long(), module.word_embeddings.weight, module.position_embeddings.weight,
        None if types is None else types.weight, module.LayerNorm.weight, module.LayerNorm.bias,
        token_type_ids=None if token_type_ids is None else token_type_ids.long().expand(input_ids.shape),
        position_ids=None if position_ids is None else position_ids.long(),
        padding_idx=module.word_embeddings.padding_idx,
        padding_positions=module.position_embeddings.padding_idx is not None,
        eps=module.LayerNorm.eps, impl=impl, **draw_dropout(module.dropout, input_ids.device),
    )  # fmt: skip
    if module.word_embeddings._forward_hooks and torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_(True)
    return embedded


def make_embeddings_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None,
                past_key_values_length=0):  # fmt: skip
        if input_ids is None or past_key_values_length:
            return original(self, input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        return embed(self, input_ids, position_ids, impl, token_type_ids)

    return forward


EMBEDDINGS = Part("embedding", make_embeddings_forward, list_embedding_layers, find_embedding_obstacle)

# ---- heads -----------------------------------------------------------------------------------------------------------


def find_bert_head(model: Any) -> Head:
    head = model.cls.predictions
    transform = head.transform
    form = find_gelu_form(transform.transform_act_fn)
    return Head(
        (model.cls, head, transform), transform.dense, form, transform.LayerNorm, head.decoder, head.decoder.bias
    )


def find_roberta_head(model: Any) -> Head:
    """The head of RoBERTa, which always uses the exact GELU."""
    head = model.lm_head
    return Head((head,), head.dense, "none", head.layer_norm, head.decoder, head.decoder.bias)


def find_electra_head(model: Any) -> Head:
    head, decoder = model.generator_predictions, model.generator_lm_head
    return Head((head,), head.dense, find_gelu_form(head.activation), head.LayerNorm, decoder, decoder.bias)


def make_discriminator_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, discriminator_hidden_states):
        product = F.linear(discriminator_hidden_states, self.dense.weight)
        activated = bias_gelu(product, self.dense.bias, approximate=find_gelu_form(self.activation), impl=impl)
        return self.dense_prediction(activated).squeeze(-1)

    return forward


DISCRIMINATOR = Part(
    "gelu", make_discriminator_forward, lambda module: (module.dense,),
    lambda module: find_activation_obstacle(module.activation),
)  # fmt: skip

# ---- families --------------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 16, "pad_token_id": 1, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def make_family(name: str, modeling: str, prefix: str, find_head: Callable[[Any], Head], **others: Part) -> Family:
    """A family whose classes are called as BERT's, with another prefix. `others` are parts that BERT does not have."""
    parts = {
        "SelfAttention": SELF_ATTENTION, "SelfOutput": OUTPUT, "Output": OUTPUT, "Intermediate": INTERMEDIATE,
        "Embeddings": EMBEDDINGS, "ForMaskedLM": masked_lm(find_head), **others,
    }  # fmt: skip
    return Family(
        name, f"transformers.models.{modeling}", {prefix + suffix: part for suffix, part in parts.items()},
        f"{prefix}ForMaskedLM", TINY,
    )  # fmt: skip


BERT_FAMILIES = (
    make_family("BERT", "bert.modeling_bert", "Bert", find_bert_head),
    make_family("RoBERTa", "roberta.modeling_roberta", "Roberta", find_roberta_head),
    make_family("XLM-RoBERTa", "xlm_roberta.modeling_xlm_roberta", "XLMRoberta", find_roberta_head),
    make_family("CamemBERT", "camembert.modeling_camembert", "Camembert", find_roberta_head),
    make_family("data2vec-text", "data2vec.modeling_data2vec_text", "Data2VecText", find_roberta_head),
    make_family(
        "ELECTRA", "electra.modeling_electra", "Electra", find_electra_head, DiscriminatorPredictions=DISCRIMINATOR
    ),
)
