"""RoBERTa for masked language modelling, written against the public functions of `fastroberta_kernels`.

The encoder of BERT with post-layer-norm (Devlin et al., arXiv 1810.04805; Liu et al., arXiv 1907.11692), no next-sentence
prediction, one token type. Two things are computed only where they are needed, which changes neither loss nor gradients:
the head sees masked tokens only, and the last layer computes queries, projection and MLP for masked rows only.

Shape suffixes: b sequences, l tokens of a sequence, k masked slots of a sequence, d hidden size, h heads, e head size,
v vocabulary. Parameters are fp32; matrix products run in `compute_dtype`, to which weights are cast where they are used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastroberta_kernels.attention import attention, varlen_attention
from fastroberta_kernels.cross_entropy import LinearCrossEntropyOutput, MaskedLMHead
from fastroberta_kernels.embedding import Embeddings, embedding_layer_norm
from fastroberta_kernels.gelu import bias_gelu
from fastroberta_kernels.layer_norm import dropout_add_layer_norm
from fastroberta_kernels.philox import fold_seed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ModelConfig

VOCABULARY_MULTIPLE = 64  # rows of the word table are padded to this: matrix products want aligned sizes
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DROPOUT_SITES = 3  # places a layer draws dropout at: attention probabilities, attention output, MLP output


class AttentionScope(NamedTuple):
    """Which keys a query may see. All fields None: every key of its own sequence.

    Attributes:
        key_lengths: int32 (b,): keys from this index on are padding.
        cu_seqlens: int32 (documents + 1,): bounds of documents in the flattened batch; attention stays inside each.
            Used instead of `key_lengths`; trailing empty documents are allowed, so that the shape can be static.
    """

    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None


WHOLE_SEQUENCE = AttentionScope()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype: the one place where fp32 parameters meet the dtype of the computation."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def gather_rows(hidden_bld: Tensor, positions_bk: Tensor) -> Tensor:
    """hidden[b, positions[b, k]] -> (b, k, d)."""
    size_b, size_l, size_d = hidden_bld.shape
    start_b1 = torch.arange(size_b, device=positions_bk.device)[:, None] * size_l
    rows = hidden_bld.reshape(-1, size_d).index_select(0, (start_b1 + positions_bk).flatten())
    return rows.view(size_b, -1, size_d)


class EncoderLayer(nn.Module):
    """One post-layer-norm transformer layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.attention_output = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_bld: Tensor,
        scope: AttentionScope,
        dropout_seeds: Tensor | None = None,
        positions_bk: Tensor | None = None,
    ) -> Tensor:
        """Args:
            dropout_seeds: int64 (3, 2), (key, first row) for each site; None: no dropout.
            positions_bk: compute the output for these positions only; keys and values still come from all of them.
        Returns:
            (b, l, d), or (b, k, d) where positions are given.
        """
        size_b, size_l, size_d = hidden_bld.shape
        weight, bias = self.query_key_value.weight, self.query_key_value.bias
        heads = (self.num_heads, size_d // self.num_heads)
        if positions_bk is None:
            residual = hidden_bld
            q, k, v = linear(hidden_bld, weight, bias).view(size_b, size_l, 3, *heads).unbind(2)
        else:
            residual = gather_rows(hidden_bld, positions_bk)
            q = linear(residual, weight[:size_d], bias[:size_d]).view(size_b, -1, *heads)
            k, v = linear(hidden_bld, weight[size_d:], bias[size_d:]).view(size_b, size_l, 2, *heads).unbind(2)

        seeds = (None, None, None) if dropout_seeds is None else dropout_seeds.unbind(0)
        hidden_dropout = 0.0 if dropout_seeds is None else self.hidden_dropout
        attention_dropout = 0.0 if dropout_seeds is None else self.attention_dropout
        if scope.cu_seqlens is None:
            context = attention(q, k, v, dropout_p=attention_dropout, seed=seeds[0], key_lengths=scope.key_lengths)
        else:
            context = varlen_attention(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
                scope.cu_seqlens if positions_bk is None else count_rows_before(positions_bk, size_l, scope.cu_seqlens),
                scope.cu_seqlens, q.shape[1], size_l, dropout_p=attention_dropout, seed=seeds[0],
            )  # fmt: skip
        context = context.reshape(size_b, -1, size_d)

        attended = dropout_add_layer_norm(
            linear(context, self.attention_output.weight), residual, self.attention_norm.weight, self.attention_norm.bias,
            p=hidden_dropout, eps=self.attention_norm.eps, x_bias=self.attention_output.bias, seed=seeds[1],
        )  # fmt: skip
        activated = bias_gelu(linear(attended, self.intermediate.weight), self.intermediate.bias)
        return dropout_add_layer_norm(
            linear(activated, self.output.weight), attended, self.output_norm.weight, self.output_norm.bias,
            p=hidden_dropout, eps=self.output_norm.eps, x_bias=self.output.bias, seed=seeds[2],
        )  # fmt: skip


def count_rows_before(positions_bk: Tensor, size_l: int, cu_seqlens: Tensor) -> Tensor:
    """How many of the chosen rows lie before each document bound: the `cu_seqlens` of the masked rows."""
    start_b1 = torch.arange(positions_bk.shape[0], device=positions_bk.device)[:, None] * size_l
    rows = (start_b1 + positions_bk).flatten()  # ascending: slots are, and unused ones hold the last position
    return torch.searchsorted(rows, cu_seqlens.long()).to(torch.int32)


class RobertaForMaskedLM(nn.Module):
    """RoBERTa with its masked-language-model head.

    Args:
        config: sizes; `vocab_size` must be set.
        pad_token_id: positions are counted from `pad_token_id + 1`, over tokens that are not padding.
        gradient_checkpointing: keep only each layer's input and compute the rest again in the backward.
    Raises:
        ValueError: no vocabulary size.
    """

    def __init__(self, config: ModelConfig, pad_token_id: int = 1, gradient_checkpointing: bool = False):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("RobertaForMaskedLM: vocab_size is not set; take it from the tokenizer")
        self.config = config
        self.pad_token_id = pad_token_id
        self.gradient_checkpointing = gradient_checkpointing
        self.compute_dtype = torch.float32
        rows = math.ceil(config.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.embeddings = Embeddings(
            rows, config.hidden_size, config.max_position_embeddings, 1, pad_token_id,
            layer_norm_eps=config.layer_norm_eps, dropout=config.hidden_dropout_prob,
        )  # fmt: skip
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = MaskedLMHead(config.hidden_size, rows, layer_norm_eps=config.layer_norm_eps)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Weights of linear layers and embeddings from N(0, initializer_range), biases 0, norms 1 and 0.

        The padding row and the rows that fill the vocabulary up are zero. Depends on `seed` alone, not on the device.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name.lower():
                parameter.fill_(1.0)
            else:
                drawn = torch.empty(parameter.shape).normal_(0.0, self.config.initializer_range, generator=generator)
                parameter.copy_(drawn)
        self.embeddings.word_embeddings.weight[self.pad_token_id] = 0
        self.embeddings.word_embeddings.weight[self.config.vocab_size :] = 0
        self.embeddings.position_embeddings.weight[self.pad_token_id] = 0

    def dropout_keys(self, seed: int | Tensor, device: torch.device) -> Tensor:
        """int64 (layers + 1, 3): an independent key for each dropout site; the last row holds the embedding's."""
        layers = torch.arange(self.config.num_hidden_layers + 1, device=device)[:, None]
        return fold_seed(seed, layers, torch.arange(DROPOUT_SITES, device=device), device=device)

    def encode(
        self,
        input_ids: Tensor,
        scope: AttentionScope,
        dropout_keys: Tensor | None = None,
        first_sample: Tensor | None = None,
        positions: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the last layer, (b, l, d), or (b, k, d) for the given positions only.

        Args:
            input_ids: int64 (b, l).
            dropout_keys: from `dropout_keys`, with `first_sample` the number of the batch's first sequence in training
                order (int64 scalar tensor); None: no dropout.
            order: int64 (b, l): a permutation of each sequence under which `scope` holds, undone at the end.
        """
        size_l = input_ids.shape[1]
        num_layers = len(self.layer)
        seeds: list[Tensor | None] = [None] * (num_layers + 1)
        if dropout_keys is not None:
            assert first_sample is not None
            rows_a_sample = torch.full_like(dropout_keys, size_l)
            if positions is not None:
                # The last layer has k rows a sequence after attention, and k query rows inside it.
                rows_a_sample[num_layers - 1] = positions.shape[1]
            seeds = list(torch.stack((dropout_keys, rows_a_sample * first_sample), dim=-1).unbind(0))
        hidden = self._embed(input_ids, seeds[num_layers])
        if order is not None:
            hidden = gather_rows(hidden, order)
        for index, layer in enumerate(self.layer):
            chosen = positions if index == num_layers - 1 else None
            if self.gradient_checkpointing and self.training:
                # Dropout is a function of its seed, so the second forward draws the same without saved generator state.
                hidden = checkpoint(
                    layer, hidden, scope, seeds[index], chosen, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = layer(hidden, scope, seeds[index], chosen)
        return hidden if order is None else gather_rows(hidden, order.argsort(dim=1))

    def _embed(self, input_ids: Tensor, seeds: Tensor | None) -> Tensor:
        tables = self.embeddings
        return embedding_layer_norm(
            input_ids,
            tables.word_embeddings.weight,
            tables.position_embeddings.weight,
            tables.token_type_embeddings.weight,
            tables.LayerNorm.weight,
            tables.LayerNorm.bias,
            padding_idx=self.pad_token_id,
            p=0.0 if seeds is None else self.config.hidden_dropout_prob,
            eps=self.config.layer_norm_eps,
            seed=None if seeds is None else seeds[0],
            dtype=self.compute_dtype,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (b, l, vocab_size) in fp32, as transformers' `RobertaForMaskedLM` gives them.

        Args:
            input_ids: int64 (b, l).
            attention_mask: (b, l), nonzero for tokens, 0 for padding, anywhere in the sequence.
        """
        order = None
        scope = WHOLE_SEQUENCE
        if attention_mask is not None:
            # Attention does not care for the order of keys: with padding moved last, its length is all there is to know.
            is_token = attention_mask.ne(0)
            order = (~is_token).long().argsort(dim=1, stable=True)
            scope = AttentionScope(key_lengths=is_token.sum(dim=1, dtype=torch.int32))
        hidden = self.encode(input_ids, scope, order=order)
        return self.lm_head.logits(hidden, self.embeddings.word_embeddings.weight, self.config.vocab_size).float()

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        scope: AttentionScope = WHOLE_SEQUENCE,
        dropout_keys: Tensor | None = None,
        first_sample: Tensor | None = None,
    ) -> LinearCrossEntropyOutput:
        """Sum of the masked tokens' losses in nats, with the counts of correct and of all masked tokens.

        Args:
            input_ids: int64 (b, l), already masked. positions: int64 (b, k), ascending. labels: int64 (b, k), -100 in
                unused slots; as `mask_tokens` returns all three.
            dropout_keys, first_sample: see `encode`.
        """
        hidden_bkd = self.encode(input_ids, scope, dropout_keys, first_sample, positions)
        return self.lm_head(
            hidden_bkd.flatten(0, 1),
            self.embeddings.word_embeddings.weight,
            labels.flatten(),
            num_classes=self.config.vocab_size,
        )
