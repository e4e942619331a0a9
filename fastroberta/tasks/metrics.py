"""Scores of predictions: scikit-learn's, scipy's and seqeval's functions under the names that reports use."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from seqeval import metrics as spans
from sklearn import metrics

from .examples import IGNORED_LABEL


def score_predictions(kind: str, logits: np.ndarray, expected: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """All metrics of a kind of task, each between -1 and 1.

    Args:
        logits: (n, number of labels), (n, choices), or (n, l, number of labels) for tokens.
        expected: (n,), (n, number of labels) for several labels, (n, l) for tokens, where IGNORED_LABEL is left out.
    """
    with warnings.catch_warnings():  # a class that is never predicted, or a constant prediction, has no score: it is 0
        warnings.simplefilter("ignore")
        scores = _SCORES[kind](decide(kind, logits), expected, labels)
    return {name: float(np.nan_to_num(value)) for name, value in scores.items()}


def decide(kind: str, logits: np.ndarray) -> np.ndarray:
    """Predictions from logits: values (n,), class numbers (n,) or (n, l), or 0 and 1 (n, number of labels)."""
    if kind == "regression":
        return logits.reshape(-1)
    if kind == "multi-label":
        return (logits > 0).astype(np.int64)  # a probability above one half
    return logits.argmax(axis=-1)


def _score_classes(predicted: np.ndarray, expected: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    # Two classes: the precision of the second, "1", as GLUE's F1 is; more: each class counts the same.
    average: dict[str, Any] = {"average": "binary" if len(labels) == 2 else "macro", "zero_division": 0}
    return {
        "accuracy": metrics.accuracy_score(expected, predicted),
        "f1": metrics.f1_score(expected, predicted, **average),
        "precision": metrics.precision_score(expected, predicted, **average),
        "recall": metrics.recall_score(expected, predicted, **average),
        "matthews": metrics.matthews_corrcoef(expected, predicted),
    }


def _score_values(predicted: np.ndarray, expected: np.ndarray, _: Sequence[str]) -> dict[str, Any]:
    if len(expected) < 2:
        return {"pearson": 0.0, "spearman": 0.0, "mse": np.mean((predicted - expected) ** 2)}
    return {
        "pearson": stats.pearsonr(predicted, expected)[0],
        "spearman": stats.spearmanr(predicted, expected)[0],
        "mse": np.mean((predicted - expected) ** 2),
    }


def _score_several(predicted: np.ndarray, expected: np.ndarray, _: Sequence[str]) -> dict[str, Any]:
    average: dict[str, Any] = {"average": "micro", "zero_division": 0}
    return {
        "f1": metrics.f1_score(expected, predicted, **average),
        "precision": metrics.precision_score(expected, predicted, **average),
        "recall": metrics.recall_score(expected, predicted, **average),
        "f1_macro": metrics.f1_score(expected, predicted, average="macro", zero_division=0),
        "accuracy": metrics.accuracy_score(expected, predicted),  # all labels of an example right
    }


def _score_tokens(predicted: np.ndarray, expected: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    is_word = expected != IGNORED_LABEL
    right = [[labels[number] for number in row[kept]] for row, kept in zip(expected, is_word)]
    found = [[labels[number] for number in row[kept]] for row, kept in zip(predicted, is_word)]
    return {
        "f1": spans.f1_score(right, found),
        "precision": spans.precision_score(right, found),
        "recall": spans.recall_score(right, found),
        "accuracy": spans.accuracy_score(right, found),
    }


_SCORES = {
    "classification": _score_classes,
    "regression": _score_values,
    "multi-label": _score_several,
    "tokens": _score_tokens,
    "multiple-choice": lambda predicted, expected, _: {"accuracy": metrics.accuracy_score(expected, predicted)},
}
