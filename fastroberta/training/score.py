"""Held-out scores: the loss, perplexity and accuracy of a model, under the same masks every time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fastroberta_kernels.masking import mask_tokens
from fastroberta_kernels.philox import as_seed
from torch import Tensor

from ..data import Batch
from ..model import AttentionScope, RobertaForMaskedLM
from ..parallel.processes import Processes

MASK_SEED = 0  # the same in every run, so that runs can be compared


@dataclass(frozen=True)
class Scores:
    """Loss in nats per masked token, accuracy as a fraction, the number of masked tokens behind both, and the same of each
    corpus where there are several."""

    loss: float
    accuracy: float
    num_masked: int
    by_corpus: tuple[Scores, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate_model(
    model: RobertaForMaskedLM,
    batches: Iterable[Batch],
    masking: dict[str, Any],
    processes: Processes | None = None,
    num_corpora: int = 1,
    device: torch.device | None = None,
) -> Scores:
    """Score a model on batches that are on its device.

    Args:
        masking: the arguments of `mask_tokens` other than ids and seeds.
        device: of the batches; that of the model if None.
        processes: set where each process scores a share of the batches; the scores are then those of all batches.
    """
    was_training = model.training
    model.eval()
    device = device or next(model.parameters()).device
    totals = torch.zeros(num_corpora, 3, dtype=torch.float64, device=device)
    seed = as_seed(MASK_SEED, device)
    try:
        for batch in batches:
            masked = mask_tokens(batch.input_ids, seed=seed, sample_ids=batch.sample_ids, **masking)
            result = model.loss(*masked, AttentionScope(batch.key_lengths, batch.cu_seqlens))
            totals[batch.corpus] += torch.stack((result.loss.double(), result.num_correct, result.num_targets))
    finally:  # the trainer tries again where memory ran out
        model.train(was_training)
    if processes is not None:
        processes.add_up(totals)
    parts = tuple(_divide(one) for one in totals) if num_corpora > 1 else ()
    return dataclasses.replace(_divide(totals.sum(0)), by_corpus=parts)


def _divide(totals: Tensor) -> Scores:
    loss, correct, count = totals.tolist()
    return Scores(loss / max(count, 1), correct / max(count, 1), int(count))
