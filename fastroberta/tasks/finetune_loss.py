"""The loss of fine-tuning, exact under gradient accumulation.

transformers' RoBERTa heads average over a micro-batch and ignore the number of items in the whole batch, while its Trainer
believes that they divide by it: sixteen micro-batches of one then give sixteen times the gradient. Here each micro-batch
gives its sum divided by the items of the whole batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .examples import IGNORED_LABEL


def make_loss(kind: str, class_weights: Tensor | None, label_smoothing: float) -> Callable[..., Tensor]:
    """The `compute_loss_func` of transformers' Trainer for a kind of task.

    Args:
        class_weights: (number of labels,), fp32, or None. For several labels, the weight of each one's presence.
    """

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if kind == "question-answering":  # (b, 2, l): the first and the last token are each one of l classes
            logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
        else:
            logits = outputs.logits.float()
        weight = None if class_weights is None else class_weights.to(logits.device)
        if kind == "regression":
            total = F.mse_loss(logits.squeeze(-1), labels, reduction="sum")
        elif kind == "multi-label":
            total = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="sum")
        else:
            total = F.cross_entropy(
                logits.flatten(0, -2), labels.flatten(), weight, ignore_index=IGNORED_LABEL, reduction="sum",
                label_smoothing=label_smoothing,
            )  # fmt: skip
        if num_items_in_batch is None:
            num_items_in_batch = labels.ne(IGNORED_LABEL).sum()
        return total / num_items_in_batch

    return compute_loss


def weigh_classes(kind: str, values: Iterable[Any], num_labels: int) -> Tensor:
    """Weights (num_labels,), fp32, that give each class the same share in the loss.

    They are n / (num_labels x n_c), so that their mean over the training data is 1; a class without examples weighs
    nothing. For several labels, the weight of a label's presence is (number without it) / (number with it).

    Args:
        values: the `labels` of the training features.
    """
    if kind == "multi-label":
        rows = torch.tensor(list(values))
        present = rows.sum(dim=0)
        return (len(rows) - present) / present.clamp(min=1)
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    counts = Counter(item for item in items if item != IGNORED_LABEL)
    total = sum(counts.values())
    return torch.tensor([total / (num_labels * counts[c]) if counts[c] else 0.0 for c in range(num_labels)])
