"""How much of what a model predicts on held-out text int8 leaves unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..corpus.tokenizer import SpecialTokenIds
from ..errors import ConfigurationError
from .inference import batch_by_length

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MASKED = 0.15  # of the ordinary tokens of a text, and at least one
BATCH_TOKENS = 2048


def compare_predictions(
    sessions: dict[str, InferenceSession],
    head: str,
    sequences: list[list[int]],
    special: SpecialTokenIds,
    labels: list[int] | None = None,
) -> dict[str, Any]:
    """The predictions of several sessions on the same texts.

    A masked LM predicts masked tokens, the same ones for all; the others label each text, or each token of it.

    Args:
        sessions: name -> session. sequences: token ids of each text, special ones included. labels: of each text, for
            sequence classification, if they are known.
    Returns:
        `predictions`: how many. `agreement`: the fraction that is the same in all sessions. `accuracy`, of a
        masked LM, or where labels are given: session -> fraction of right predictions.
    Raises:
        ConfigurationError: a model with one output predicts no label.
    """
    rng = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {name: [] for name in sessions}
    truth: list[Any] = []
    for indices in batch_by_length(sequences, BATCH_TOKENS):
        length = max(len(sequences[index]) for index in indices)
        rows = [sequences[index] + [special.pad] * (length - len(sequences[index])) for index in indices]
        input_ids = np.array(rows, dtype=np.int64)
        attention_mask = (np.arange(length) < [[len(sequences[index])] for index in indices]).astype(np.int64)
        chosen = (attention_mask == 1) & ~np.isin(input_ids, special)
        if head == "MaskedLM":
            scores = np.where(chosen, rng.random(input_ids.shape), 2)
            ranks = scores.argsort(axis=1).argsort(axis=1)
            chosen &= ranks < np.maximum(1, np.round(MASKED * chosen.sum(axis=1, keepdims=True)))
            truth.append(input_ids[chosen])
            input_ids = np.where(chosen, special.mask, input_ids)
        elif labels is not None:
            truth.append([labels[index] for index in indices])
        for name, session in sessions.items():
            logits = session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})[0]
            if logits.shape[-1] == 1:
                raise ConfigurationError(
                    "file: a regression predicts no label that could stay the same; leave --file out"
                )
            best = logits.argmax(axis=-1)
            found[name].append(best if head == "SequenceClassification" else best[chosen])
    predictions = {name: np.concatenate(parts) for name, parts in found.items()}
    first, *others = predictions.values()
    same = np.all([other == first for other in others], axis=0)
    result: dict[str, Any] = {"predictions": len(first), "agreement": float(same.mean())}
    if truth:
        expected = np.concatenate(truth)
        result["accuracy"] = {name: float((best == expected).mean()) for name, best in predictions.items()}
    return result
