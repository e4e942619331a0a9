"""Head and loss of a masked language model in training: rows with a label only, and never all logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ._exchange import Part, has_hooks, may_look
from .cross_entropy import linear_cross_entropy
from .gelu import bias_gelu
from .layer_norm import layer_norm

IGNORED_LABEL = -100  # the default of torch.nn.CrossEntropyLoss, which transformers uses


class Head(NamedTuple):
    """The layers of a masked-language-model head.

    Attributes:
        holders: modules around them, which the new forward passes by.
        form: of GELU: "none" or "tanh"; None if the activation is not GELU.
        bias: of the decoder, wherever the model keeps it.
    """

    holders: tuple[nn.Module, ...]
    dense: nn.Module
    form: str | None
    norm: nn.Module
    decoder: nn.Module
    bias: torch.Tensor | None


def masked_lm(
    find_head: Callable[[Any], Head], find_obstacle: Callable[[Any], str | None] = lambda model: None
) -> Part:
    """The part of a masked language model whose head `find_head` finds."""

    def find_any_obstacle(model: Any) -> str | None:
        head = find_head(model)
        if head.form is None:
            return "the activation of its head is not GELU"
        if any(map(has_hooks, head.holders)):
            return "its head has hooks"
        return find_obstacle(model)

    def list_layers(model: Any) -> tuple[nn.Module, ...]:
        head = find_head(model)
        return head.dense, head.norm, head.decoder

    def make_forward(original: Callable, impl: str | None) -> Callable:
        from transformers.modeling_outputs import MaskedLMOutput
        from transformers.utils.generic import can_return_tuple

        names = list(inspect.signature(original).parameters)[1:]

        @can_return_tuple
        def forward_training(self, labels, num_items_in_batch=None, **kwargs):
            outputs = self.base_model(**kwargs, return_dict=True)
            hidden, labels = outputs.last_hidden_state.flatten(0, 1), labels.flatten()
            if may_look(labels):
                rows = (labels != IGNORED_LABEL).nonzero()[:, 0]
                labels = labels[rows]
                hidden = hidden.index_select(0, rows.to(hidden.device))
            head = find_head(self)
            activated = bias_gelu(
                F.linear(hidden, head.dense.weight), head.dense.bias, approximate=head.form, impl=impl
            )
            loss = linear_cross_entropy(
                layer_norm(activated, head.norm.weight, head.norm.bias, eps=head.norm.eps, impl=impl),
                head.decoder.weight, head.bias, labels.to(hidden.device), ignore_index=IGNORED_LABEL,
                reduction="mean" if num_items_in_batch is None else "sum", impl=impl,
            ).loss  # fmt: skip
            if isinstance(num_items_in_batch, torch.Tensor):
                num_items_in_batch = num_items_in_batch.to(loss.device)
            return MaskedLMOutput(
                loss=loss if num_items_in_batch is None else loss / num_items_in_batch,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

        def forward(self, *args, **kwargs):
            arguments = dict(zip(names, args)) | kwargs
            if not self.training or arguments.get("labels") is None:
                return original(self, *args, **kwargs)
            return forward_training(self, **arguments)

        return forward

    return Part("mlm_head", make_forward, list_layers, find_any_obstacle)
