"""From logits to predictions in words and to scores, for every kind of task.

The scores are scikit-learn's, scipy's and seqeval's, and SQuAD's own (`questions`), under the names that reports use.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from seqeval import metrics as spans
from sklearn import metrics

from .examples import IGNORED_LABEL, Examples
from .questions import choose_answers, choose_threshold, score_answers, settle_answer


def score_examples(
    kind: str, labels: Sequence[str], part: Examples, logits: np.ndarray, threshold: float | None = None
) -> dict[str, float]:
    """All metrics of a labelled part.

    Args:
        logits: one row for each feature of the part; see `score_predictions`, and `choose_answers` for questions.
        threshold: the doubt above which a question gets no answer; None: chosen here for the best F1 and returned as
            `no_answer_threshold`, unless every question has an answer.
    """
    if kind != "question-answering":
        return score_predictions(kind, logits, stack_labels(part, logits), labels)
    answers = choose_answers(part, logits)
    if threshold is None:
        threshold = choose_threshold(part, answers)
    chosen = {"no_answer_threshold": threshold} if math.isfinite(threshold) else {}
    return score_answers(part, answers, threshold) | chosen


def list_predictions(
    kind: str, labels: Sequence[str], part: Examples, logits: np.ndarray, threshold: float | None = None
) -> list[str]:
    """A prediction in words for each example.

    Several labels are joined by commas, the tags of a sentence's words by spaces; a word that was cut off gets the tag O.

    Args:
        threshold: as in `score_examples`; None: every question is answered.
    """
    if kind == "question-answering":
        limit = math.inf if threshold is None else threshold
        return [settle_answer(answer, limit) for answer in choose_answers(part, logits)]
    decided = decide(kind, logits)
    if kind == "regression":
        return [f"{value:.3f}" for value in decided]
    if kind == "multi-label":
        return [",".join(itertools.compress(labels, row)) for row in decided]
    if kind == "tokens":
        found = []
        for row, feature in zip(decided, part.features):
            tags = {word: labels[number] for word, number in zip(feature["words"], row) if word is not None}
            found.append(" ".join(tags.get(word, "O") for word in range(feature["num_words"])))
        return found
    return [labels[number] for number in decided]


def stack_labels(part: Examples, logits: np.ndarray) -> np.ndarray:
    """The labels of all examples as one array; those of tokens are padded to the length of the logits."""
    values = [feature["labels"] for feature in part.features]
    if logits.ndim < 3:
        return np.array(values)
    expected = np.full(logits.shape[:2], IGNORED_LABEL)
    for row, labels in zip(expected, values):
        row[: len(labels)] = labels
    return expected


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
