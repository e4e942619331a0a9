"""Parts of ESM-2. transformers rotates queries and keys before it calls the attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from ._bert import TINY
from ._exchange import Family, Part, report_only
from ._hf_attention import SELF_ATTENTION
from ._masked_lm import Head, masked_lm
from .gelu import bias_gelu


def make_intermediate_forward(original: Callable, impl: str | None) -> Callable:
    def forward(self, hidden_states):
        return bias_gelu(F.linear(hidden_states, self.dense.weight), self.dense.bias, impl=impl)

    return forward


def find_head(model: Any) -> Head:
    head = model.lm_head
    return Head((head,), head.dense, "none", head.layer_norm, head.decoder, head.bias)


PRE_NORM = report_only("layer_norm", "the sum of dropout and residual is needed without LayerNorm too (pre-LayerNorm)")

ESM = Family(
    "ESM-2",
    "transformers.models.esm.modeling_esm",
    {
        "EsmSelfAttention": SELF_ATTENTION,
        "EsmSelfOutput": PRE_NORM,
        "EsmOutput": PRE_NORM,
        "EsmIntermediate": Part("gelu", make_intermediate_forward, lambda module: (module.dense,)),
        "EsmEmbeddings": report_only("embedding", "it scales words by the share of masked tokens, without LayerNorm"),
        "EsmForMaskedLM": masked_lm(find_head),
    },
    "EsmForMaskedLM",
    {**TINY, "mask_token_id": 2, "position_embedding_type": "rotary"},
)
