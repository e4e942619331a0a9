"""What fine-tuning leaves behind beside the model: predictions, the confusion matrix and the curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from .examples import Examples
from .metrics import decide

MOST_CLASSES_DRAWN = 40  # more squares than this cannot be read


def write_predictions(path: Path, predictions: Sequence[str], part: Examples) -> None:
    """Predictions in GLUE's submission format: `index` and `prediction`, separated by a tab, in the file's order.

    Answers to questions are also written as SQuAD's scorer takes them, beside it in .json: texts by the questions' ids.
    """
    lines = [f"{index}\t{' '.join(text.split())}" for index, text in enumerate(predictions)]
    path.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")
    if part.questions:
        answers = {question.id: text for question, text in zip(part.questions, predictions)}
        path.with_suffix(".json").write_text(json.dumps(answers, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def draw_confusion(
    path: Path, kind: str, logits: np.ndarray, expected: np.ndarray, labels: Sequence[str], title: str
) -> None:
    """The confusion matrix of the dev data as PNG: true classes in rows, predicted ones in columns, with counts.

    For regression, predictions against true values; for several labels and many classes, nothing.
    """
    if kind == "regression":
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        axes.scatter(expected, decide(kind, logits), s=10, alpha=0.5)
        axes.axline((float(np.mean(expected)),) * 2, slope=1, color="grey", linewidth=1)
        axes.set(xlabel="True value", ylabel="Predicted value", title=title)
    elif kind == "classification" and len(labels) <= MOST_CLASSES_DRAWN:
        counts = confusion_matrix(expected, decide(kind, logits), labels=range(len(labels)))
        size = 3.5 + 0.45 * len(labels)
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.subplots()
        display = ConfusionMatrixDisplay(counts, display_labels=[label[:20] for label in labels])
        display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45 if len(labels) > 3 else 0)
        axes.set(xlabel="Predicted", ylabel="True", title=title)
    else:
        return
    figure.savefig(path, dpi=120)


def draw_curves(path: Path, history: list[dict[str, float]], metric: str, title: str) -> None:
    """Training loss by step, and dev loss and metric by epoch, as PNG.

    Args:
        history: the Trainer's `state.log_history`.
    """
    trained = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    scored = [(entry["step"], entry["eval_loss"], entry[f"eval_{metric}"]) for entry in history if "eval_loss" in entry]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*trained), label="train", linewidth=1)
    left.plot([step for step, _, _ in scored], [loss for _, loss, _ in scored], "o-", label="dev")
    left.set(xlabel="Step", ylabel="Loss", title="Loss")
    left.legend()
    right.plot([step for step, _, _ in scored], [value for _, _, value in scored], "o-", color="tab:green")
    right.set(xlabel="Step", ylabel=metric, title=f"dev {metric}")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
