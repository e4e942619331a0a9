"""Next-sentence prediction, for the comparison of the RoBERTa paper's table 2 and for nothing else.

BERT's objective (Devlin et al., arXiv 1810.04805, section 3.1 and appendix A.2): token types tell the two parts of a pair
apart, and a head of two classes on `<s>` says whether the second follows the first. The encoder, the head for masked
tokens, the masks, the optimizer and the training loop are the product's. Checkpoints hold an ordinary model, in which
every token has the type of the first part; what belongs to pairs lies beside it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from fastroberta_kernels.cross_entropy import LinearCrossEntropyOutput
from fastroberta_kernels.embedding import Embeddings, embedding_layer_norm
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint import write_tensors
from ..config import TrainConfig
from ..corpus.manifest import Manifest
from ..data import Batch, heldout_batches, move_ahead
from ..model import WHOLE_SEQUENCE, AttentionScope, RobertaForMaskedLM
from ..training.initial_model import build_model
from ..training.trainer import Trainer
from .blocks import PairBatch, PairBlocks

FILE = "next_sentence.safetensors"


class PairEmbeddings(Embeddings):
    """Embeddings in which all tokens after the first `</s>` have a second token type."""

    def __init__(self, model: RobertaForMaskedLM, eos_token_id: int):
        config, ordinary = model.config, model.embeddings
        super().__init__(
            ordinary.word_embeddings.num_embeddings, config.hidden_size, config.max_position_embeddings, 1,
            model.pad_token_id, layer_norm_eps=config.layer_norm_eps, dropout=config.hidden_dropout_prob,
        )  # fmt: skip
        self.eos_token_id = eos_token_id
        self.second_type = nn.Parameter(torch.zeros(1, config.hidden_size))

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        dtype: torch.dtype | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """Hidden states (b, l, d) of pairs (b, l) int64; for the other arguments see `embedding_layer_norm`."""
        is_end = input_ids == self.eos_token_id
        token_type_ids = ((is_end.cumsum(1) - is_end.long()) > 0).long()
        types = torch.cat((self.token_type_embeddings.weight, self.second_type))
        return embedding_layer_norm(
            input_ids, self.word_embeddings.weight, self.position_embeddings.weight, types,
            self.LayerNorm.weight, self.LayerNorm.bias, token_type_ids=token_type_ids, position_ids=position_ids,
            padding_idx=self.padding_idx, padding_positions=self.padding_positions, p=self.p if self.training else 0.0,
            eps=self.LayerNorm.eps, seed=seed, dtype=dtype, impl=impl,
        )  # fmt: skip


class RobertaForPairs(RobertaForMaskedLM):
    """The model with a second token type and a head for next-sentence prediction.

    Args:
        ordinary: whose sizes and weights it takes. seed: of the weights that are its own.
    """

    def __init__(self, ordinary: RobertaForMaskedLM, eos_token_id: int, seed: int):
        super().__init__(ordinary.config, ordinary.pad_token_id, ordinary.gradient_checkpointing)
        self.embeddings = PairEmbeddings(self, eos_token_id)
        self.pooler = nn.Linear(self.config.hidden_size, self.config.hidden_size)
        self.next_sentence = nn.Linear(self.config.hidden_size, 2)
        self.load_state_dict(ordinary.state_dict(), strict=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.own_parameters().items():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those that the ordinary model lacks, by name."""
        parts = ("pooler.", "next_sentence.", "embeddings.second_type")
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(parts)}

    def classify(self, hidden_bd: Tensor) -> Tensor:
        """Logits (b, 2) in fp32 of the hidden states of `<s>`; class 1: the second part follows the first."""
        return self.next_sentence(torch.tanh(self.pooler(hidden_bd.float())))

    def loss(
        self,
        input_ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        scope: AttentionScope = WHOLE_SEQUENCE,
        dropout_keys: Tensor | None = None,
        first_sample: Tensor | None = None,
        is_next: Tensor | None = None,
    ) -> LinearCrossEntropyOutput:
        """As in the ordinary model; with `is_next`, int64 (b,), the loss also has the mean loss of the pairs, times the
        number of masked tokens, by which the trainer divides it."""
        if is_next is None:
            return super().loss(input_ids, positions, labels, scope, dropout_keys, first_sample)
        # The last layer computes masked rows only, and <s> beside them.
        rows = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
        hidden = self.encode(input_ids, scope, dropout_keys, first_sample, rows)
        result = self.lm_head(
            hidden[:, 1:].flatten(0, 1),
            self.decoder_weight,
            labels.flatten(),
            num_classes=self.config.vocab_size,
        )
        of_pairs = F.cross_entropy(self.classify(hidden[:, 0]), is_next)
        return result._replace(loss=result.loss + of_pairs * result.num_targets)


def build_pair_model(
    config: TrainConfig, manifest: Manifest, checkpoint: Path | None = None
) -> tuple[RobertaForPairs, list[str]]:
    """The model for pairs, and what is to be said about it; what is its own comes from the checkpoint, if there is one.

    Raises:
        CheckpointError, ConfigurationError: see `build_model`.
    """
    ordinary, notes = build_model(config, manifest, checkpoint)
    model = RobertaForPairs(ordinary, manifest.special_token_ids["eos_token_id"], config.seed)
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint / FILE), strict=False)
    return model, notes


class PairTrainer(Trainer):
    """A `Trainer` whose batches are `PairBatch`."""

    build_model = staticmethod(build_pair_model)
    model: RobertaForPairs

    def forward(self, batch: Batch) -> LinearCrossEntropyOutput:
        """The summed loss of a micro-batch, that of its pairs included."""
        assert isinstance(batch, PairBatch)
        self.loss = functools.partial(self.model.loss, is_next=batch.is_next)
        return super().forward(batch)

    def write_model(self, path: Path, weights: dict[str, Tensor]) -> None:
        """Write an ordinary model, and beside it what belongs to pairs."""
        super().write_model(path, weights)
        write_tensors({name: weights[name].detach().cpu() for name in self.model.own_parameters()}, path / FILE)


@torch.no_grad()
def score_pairs(model: RobertaForPairs, blocks: PairBlocks, num_pairs: int, batch_size: int) -> float:
    """The fraction of pairs of which the model says rightly whether their parts follow each other."""
    model.eval()
    device = next(model.parameters()).device
    num_right = count = 0
    for batch in move_ahead(heldout_batches(blocks, num_pairs, batch_size), device):
        assert isinstance(batch, PairBatch)
        first = torch.zeros(len(batch.input_ids), 1, dtype=torch.long, device=device)
        hidden = model.encode(batch.input_ids, AttentionScope(batch.key_lengths), positions=first)
        num_right += int((model.classify(hidden[:, 0]).argmax(1) == batch.is_next).sum())
        count += len(batch.input_ids)
    return num_right / count
