"""What the batch size means for the learning rate: the paper's pairs, and the two rules that scale from one to another.

The linear rule keeps learning rate / batch size (Goyal et al., arXiv 1706.02677), the square-root rule keeps learning
rate / sqrt(batch size) (Hoffer et al., arXiv 1705.08741), which fits Adam better (Malladi et al., arXiv 2205.10287).
"""

from __future__ import annotations

import math

from .config import TrainConfig

# Table 3 of RoBERTa (arXiv 1907.11692): sequences of 512 tokens per step -> best peak rate for BERT-base.
PAPER = {256: 1e-4, 2048: 7e-4, 8192: 1e-3}


def advise_on_learning_rate(config: TrainConfig) -> str:
    """Two lines: the paper's pairs, and what each rule makes of the nearest one for this run's batch, in tokens."""
    size = config.train_batch_size * config.max_seq_length / 512
    nearest = min(PAPER, key=lambda one: abs(math.log(size / one)))
    linear = PAPER[nearest] * size / nearest
    root = PAPER[nearest] * math.sqrt(size / nearest)
    pairs = ", ".join(f"{rate:g} at {_shorten(one)}" for one, rate in PAPER.items())
    scaled = "as in the paper"
    if size != nearest:
        scaled = (
            f"scaled from {_shorten(nearest)}, {root:.1e} by the square-root rule or {linear:.1e} by the linear rule; "
            "smaller models take more"
        )
    return (
        f"learning rate {config.optimizer.learning_rate:g}; in the paper, for sequences of 512: BERT-base {pairs}; "
        f"RoBERTa-base 0.0006 at 8K\n  {config.train_batch_size:,} sequences of {config.max_seq_length}: {scaled}"
    )


def _shorten(size: int) -> str:
    return f"{size // 1024}K" if size >= 1024 else str(size)
