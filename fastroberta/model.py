"""RoBERTa for masked language modelling, built on the public functions of `fastroberta_kernels`.

The post-layer-norm encoder of BERT (Devlin et al., arXiv 1810.04805; Liu et al., arXiv 1907.11692), without next-sentence
prediction; every token is of type 0. Two shortcuts save work and change neither the loss nor its gradients: the head
sees masked tokens only, and the last layer computes its queries, projection and MLP for masked rows only.

Shape suffixes: b sequences, l tokens per sequence, k masked slots per sequence, d hidden size. Parameters are fp32;
matrix products run in `compute_dtype`, to which weights are cast at each use, or once for a whole step (`cast_once`). With
`precision` fp8 that is bf16, and the products of the layers with their weights multiply 8-bit numbers.

Dropout follows `training`, as in any PyTorch module. In training mode it needs the keys that `dropout_keys` makes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastroberta_kernels.attention import attention, varlen_attention
from fastroberta_kernels.cross_entropy import LinearCrossEntropyOutput, MaskedLMHead
from fastroberta_kernels.embedding import Embeddings
from fastroberta_kernels.fp8 import Scaled, ScaledWeight, bound_layer_norm, cast_weight, fp8_linear
from fastroberta_kernels.fp8_mlp import ScaledMLP, cast_mlp, fp8_mlp
from fastroberta_kernels.gelu import bias_gelu
from fastroberta_kernels.layer_norm import DropoutAddLayerNorm
from fastroberta_kernels.philox import fold_seed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ModelConfig

VOCABULARY_MULTIPLE = 64  # the word table is padded to a multiple of this: matrix products are faster when aligned
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
DROPOUT_SITES = 3  # per layer: attention probabilities, attention output, MLP output


class AttentionScope(NamedTuple):
    """Which keys a query may attend to. With both fields None: every key of its own sequence.

    Attributes:
        key_lengths: int32 (b,). Keys from this index on are padding.
        cu_seqlens: int32 (documents + 1,), the document boundaries in the flattened batch; attention stays inside each
            document. Replaces `key_lengths`. Empty documents at the end are allowed, which lets the shape be static.
    """

    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None


WHOLE_SEQUENCE = AttentionScope()
NO_DROPOUT = (None,) * DROPOUT_SITES


def gather_rows(hidden_bld: Tensor, positions_bk: Tensor) -> Tensor:
    """hidden[b, positions[b, k]] -> (b, k, d)."""
    size_b, size_l, size_d = hidden_bld.shape
    start_b1 = torch.arange(size_b, device=positions_bk.device)[:, None] * size_l
    rows = hidden_bld.reshape(-1, size_d).index_select(0, (start_b1 + positions_bk).flatten())
    return rows.view(size_b, -1, size_d)


class In8Bits(NamedTuple):
    """A layer's weights in 8 bits, and bounds on what its two LayerNorms give."""

    qkv: ScaledWeight
    attention: ScaledWeight
    mlp: ScaledMLP
    attended_bound: Tensor
    output_bound: Tensor


class LayerWeights(NamedTuple):
    """What takes part in a layer's matrix products, in the compute dtype: the weight and bias of queries, keys and values,
    and the weights of the other three linear layers, whose biases belong to fused kernels."""

    qkv: Tensor
    qkv_bias: Tensor
    attention: Tensor
    up: Tensor
    down: Tensor
    in_8_bits: In8Bits | None


class EncoderLayer(nn.Module):
    """One post-layer-norm transformer layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.gelu_approximation = "none" if config.hidden_act == "gelu" else "tanh"
        size_d, dropout, eps = config.hidden_size, config.hidden_dropout_prob, config.layer_norm_eps
        self.query_key_value = nn.Linear(size_d, 3 * size_d)
        self.attention_output = nn.Linear(size_d, size_d)
        self.attention_norm = DropoutAddLayerNorm(size_d, dropout, eps)
        self.intermediate = nn.Linear(size_d, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, size_d)
        self.output_norm = DropoutAddLayerNorm(size_d, dropout, eps)
        self.uses_fp8 = False  # set by `RobertaForMaskedLM.set_precision`
        self.casts: LayerWeights | None = None  # set by `RobertaForMaskedLM.cast_once`

    def cast(self, dtype: torch.dtype) -> LayerWeights:
        """The weights as matrix products take them, in a dtype and, with fp8, in 8 bits too."""
        qkv = self.query_key_value
        parameters = (qkv.weight, qkv.bias, self.attention_output.weight, self.intermediate.weight, self.output.weight)
        weight, bias, w_attention, w_up, w_down = (parameter.to(dtype) for parameter in parameters)
        in_8_bits = None
        if self.uses_fp8:
            # From 16 bits, in which sharding: optimizer sends the weights: every mode rounds the same numbers.
            between, after = ((norm.weight, norm.bias) for norm in (self.attention_norm, self.output_norm))
            mlp = cast_mlp(w_up, self.intermediate.bias, w_down, row_norm=bound_layer_norm(*between, order=2))
            in_8_bits = In8Bits(
                cast_weight(weight), cast_weight(w_attention), mlp, bound_layer_norm(*between), bound_layer_norm(*after)
            )
        return LayerWeights(weight, bias, w_attention, w_up, w_down, in_8_bits)

    def forward(
        self,
        hidden_bld: Tensor,
        scope: AttentionScope,
        dropout_seeds: Sequence[Tensor | None] = NO_DROPOUT,
        positions_bk: Tensor | None = None,
        hidden_8: Scaled | None = None,
    ) -> tuple[Tensor, Scaled | None]:
        """Args:
            dropout_seeds: int64 (2,), a key and a first row, for each of the three sites. Needed in training mode with
                dropout.
            positions_bk: compute the output at these positions only. Keys and values still come from all positions.
            hidden_8: with fp8, `hidden_bld` in 8 bits, if the layer before wrote it.
        Returns:
            (b, l, d), or (b, k, d) if positions are given; and the same in 8 bits with fp8, else None.
        """
        size_b, size_l, size_d = hidden_bld.shape
        weight, bias, w_attention, w_up, w_down, in_8_bits = self.casts or self.cast(hidden_bld.dtype)
        heads = (self.num_heads, size_d // self.num_heads)
        if positions_bk is None:
            residual = hidden_bld
            weight_8 = in_8_bits and in_8_bits.qkv
            q, k, v = multiply(hidden_bld, weight, bias, hidden_8, weight_8).view(size_b, size_l, 3, *heads).unbind(2)
        else:
            residual = gather_rows(hidden_bld, positions_bk)
            sizes = (size_d, 2 * size_d)
            (w_q, w_kv), (b_q, b_kv) = weight.split(sizes), bias.split(sizes)
            q_8, kv_8 = in_8_bits.qkv.split(*sizes) if in_8_bits else (None, None)
            q = multiply(residual, w_q, b_q, None, q_8).view(size_b, -1, *heads)
            k, v = multiply(hidden_bld, w_kv, b_kv, hidden_8, kv_8).view(size_b, size_l, 2, *heads).unbind(2)

        dropout_p = self.attention_dropout if self.training else 0.0
        if scope.cu_seqlens is None:
            context = attention(q, k, v, dropout_p=dropout_p, seed=dropout_seeds[0], key_lengths=scope.key_lengths)
        else:
            context = varlen_attention(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
                scope.cu_seqlens if positions_bk is None else count_rows_before(positions_bk, size_l, scope.cu_seqlens),
                scope.cu_seqlens, q.shape[1], size_l, dropout_p=dropout_p, seed=dropout_seeds[0],
            )  # fmt: skip
        context = context.reshape(size_b, -1, size_d)

        if in_8_bits is None:
            attended = self.attention_norm(
                F.linear(context, w_attention), residual, self.attention_output.bias, dropout_seeds[1]
            )
            widened = F.linear(attended, w_up)
            activated = bias_gelu(widened, self.intermediate.bias, approximate=self.gelu_approximation)
            output = self.output_norm(F.linear(activated, w_down), attended, self.output.bias, dropout_seeds[2])
            return output, None
        attended, attended_8 = self.attention_norm(
            fp8_linear(context, w_attention, weight_8=in_8_bits.attention), residual, self.attention_output.bias,
            dropout_seeds[1], in_8_bits.attended_bound,
        )  # fmt: skip
        projected = fp8_mlp(
            attended, w_up, self.intermediate.bias, w_down, approximate=self.gelu_approximation, x_8=attended_8,
            weights_8=in_8_bits.mlp,
        )  # fmt: skip
        return self.output_norm(projected, attended, self.output.bias, dropout_seeds[2], in_8_bits.output_bound)


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor, x_8: Scaled | None = None, weight_8: ScaledWeight | None = None
) -> Tensor:
    """x weight^T + bias, with 8-bit factors if the weight is there in 8 bits."""
    if weight_8 is None:
        return F.linear(x, weight, bias)
    return fp8_linear(x, weight, bias, x_8=x_8, weight_8=weight_8)


def count_rows_before(positions_bk: Tensor, size_l: int, cu_seqlens: Tensor) -> Tensor:
    """The number of chosen rows before each document boundary: the `cu_seqlens` of the masked rows."""
    start_b1 = torch.arange(positions_bk.shape[0], device=positions_bk.device)[:, None] * size_l
    rows = (start_b1 + positions_bk).flatten()  # ascending: used slots are, and unused ones hold the last position
    return torch.searchsorted(rows, cu_seqlens.long()).to(torch.int32)


class RobertaForMaskedLM(nn.Module):
    """RoBERTa with its masked-language-model head.

    Args:
        config: the architecture. `vocab_size` must be set.
        pad_token_id: id of padding. Positions of all other tokens count from `pad_token_id + 1`.
        gradient_checkpointing: keep only the input of each layer, and recompute the rest in the backward.
    Raises:
        ValueError: `vocab_size` is not set.
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
            rows, config.hidden_size, config.max_position_embeddings, config.type_vocab_size, pad_token_id,
            layer_norm_eps=config.layer_norm_eps, dropout=config.hidden_dropout_prob,
        )  # fmt: skip
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = MaskedLMHead(config.hidden_size, rows, layer_norm_eps=config.layer_norm_eps)
        if not config.tie_word_embeddings:
            self.decoder = nn.Linear(config.hidden_size, rows, bias=False)  # its bias is the head's

    @property
    def decoder_weight(self) -> Tensor:
        """What the head multiplies by, (rows, d): the word embeddings, or a matrix of its own where they are not tied."""
        return self.embeddings.word_embeddings.weight if self.config.tie_word_embeddings else self.decoder.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the weights of linear layers and embeddings from N(0, initializer_range); biases are 0, norm weights 1.

        The padding row and the rows beyond `vocab_size` are zero. The result depends on `seed`, not on the device.
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
        for table in (self.embeddings.word_embeddings.weight, self.decoder_weight):
            table[self.config.vocab_size :] = 0
        self.embeddings.position_embeddings.weight[self.pad_token_id] = 0

    def set_precision(self, precision: str) -> None:
        """Choose what matrix products run in: bf16, fp16, fp32 or fp8."""
        self.compute_dtype = COMPUTE_DTYPES[precision]
        for layer in self.layer:
            layer.uses_fp8 = precision == "fp8"  # type: ignore[assignment]

    @contextlib.contextmanager
    def cast_once(self) -> Iterator[None]:
        """In the block, which must not change the weights, layers share one cast of their matrices for all uses.

        For the micro-batches of a step. Each backward passes through the cast again, so gradients are the same to the bit.
        With gradient checkpointing, where memory counts more, layers go on casting at each use.
        """
        if self.compute_dtype == torch.float32 or self.gradient_checkpointing:
            yield
            return
        layers: list[EncoderLayer] = list(self.layer)  # type: ignore[arg-type]
        try:
            for layer in layers:
                layer.casts = layer.cast(self.compute_dtype)
            yield
        finally:
            for layer in layers:
                layer.casts = None

    def dropout_keys(self, seed: int | Tensor, device: torch.device) -> Tensor:
        """int64 (layers + 1, 3): an independent key for each dropout site. The last row belongs to the embeddings."""
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
            dropout_keys: as made by `dropout_keys`. first_sample: int64 scalar tensor, the number of the batch's first
                sequence in training order. Both are needed in training mode with dropout, and unused otherwise.
            order: int64 (b, l), a permutation of each sequence that makes `scope` hold. It is undone at the end.
        Raises:
            ValueError: training mode with dropout, but no keys.
        """
        size_l = input_ids.shape[1]
        num_layers = len(self.layer)
        seeds: Sequence[Tensor | None] = NO_DROPOUT * (num_layers + 1)  # three for each layer, then for the embeddings
        if dropout_keys is not None and first_sample is not None:
            rows_per_sample = torch.full_like(dropout_keys, size_l)
            if positions is not None:
                rows_per_sample[num_layers - 1].fill_(positions.shape[1])  # the last layer works on k rows per sequence
            seeds = torch.stack((dropout_keys, rows_per_sample * first_sample), dim=-1).flatten(0, 1).unbind(0)
        elif self.training and max(self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob) > 0:
            raise ValueError(
                "RobertaForMaskedLM: dropout needs dropout_keys and first_sample; pass both, or call eval()"
            )
        hidden = self.embeddings(input_ids, seed=seeds[DROPOUT_SITES * num_layers], dtype=self.compute_dtype)
        if order is not None:
            hidden = gather_rows(hidden, order)
        hidden_8: Scaled | None = None
        for index, layer in enumerate(self.layer):
            chosen = positions if index == num_layers - 1 else None
            layer_seeds = seeds[DROPOUT_SITES * index : DROPOUT_SITES * (index + 1)]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Dropout is a function of its seed: recomputing repeats it without the generator's state.
                hidden, hidden_8 = checkpoint(
                    layer, hidden, scope, layer_seeds, chosen, hidden_8, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, hidden_8 = layer(hidden, scope, layer_seeds, chosen, hidden_8)
        return hidden if order is None else gather_rows(hidden, order.argsort(dim=1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (b, l, vocab_size) in fp32, as those of transformers' `RobertaForMaskedLM`. For evaluation mode.

        Args:
            input_ids: int64 (b, l).
            attention_mask: (b, l), nonzero for tokens and 0 for padding, which may be anywhere in the sequence.
        """
        order = None
        scope = WHOLE_SEQUENCE
        if attention_mask is not None:
            # Attention ignores the order of keys. With padding moved to the end, a length describes the whole mask.
            is_token = attention_mask.ne(0)
            order = (~is_token).long().argsort(dim=1, stable=True)
            scope = AttentionScope(key_lengths=is_token.sum(dim=1, dtype=torch.int32))
        hidden = self.encode(input_ids, scope, order=order)
        return self.lm_head.logits(hidden, self.decoder_weight, self.config.vocab_size).float()

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        scope: AttentionScope = WHOLE_SEQUENCE,
        dropout_keys: Tensor | None = None,
        first_sample: Tensor | None = None,
    ) -> LinearCrossEntropyOutput:
        """The summed loss of masked tokens in nats, and how many of them are predicted correctly and in total.

        Args:
            input_ids: int64 (b, l), already masked. positions: int64 (b, k), ascending. labels: int64 (b, k), -100 in
                unused slots. All three are as `mask_tokens` returns them.
            dropout_keys, first_sample: see `encode`.
        """
        hidden_bkd = self.encode(input_ids, scope, dropout_keys, first_sample, positions)
        return self.lm_head(
            hidden_bkd.flatten(0, 1), self.decoder_weight, labels.flatten(), num_classes=self.config.vocab_size
        )
