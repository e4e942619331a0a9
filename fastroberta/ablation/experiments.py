"""The experiments of the RoBERTa paper: what varies in each, and what the paper found.

Figures are those of Liu et al., arXiv 1907.11692, tables 1 to 4. All experiments share one baseline (dynamic masking,
full sentences, 15% masked, all data), which is trained once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SOURCE = "Liu et al., arXiv 1907.11692"

# Settings of `train`, over its defaults, and of `finetune`, over its own.
SMALL: dict[str, Any] = {
    "precision": "fp32",
    "max_seq_length": 64,
    "train_batch_size": 8,
    "max_steps": 6400,
    "logging_steps": 800,
    "eval_sequences": 512,
    "save_steps": 3200,
    "save_total_limit": 1,
    "model": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.06,
    },
    "optimizer": {"learning_rate": 1e-3},
    "lr_scheduler": {"warmup_steps": 384},
}
SMALL_TASK: dict[str, Any] = {
    "learning_rate": 1e-3, "train_batch_size": 32, "epochs": 2, "kernels": False, "precision": "fp32",
}  # fmt: skip
PAPER: dict[str, Any] = {
    "train_batch_size": 256,
    "max_steps": 1_000_000,
    "logging_steps": 500,
    "save_steps": 10_000,
    "save_total_limit": 1,
    "optimizer": {"learning_rate": 1e-4},
    "lr_scheduler": {"warmup_steps": 10_000},
}
PRESETS = {"small": (SMALL, SMALL_TASK), "paper": (PAPER, {})}
# What the baseline is, whatever the preset says.
BASELINE_SETTINGS = {"masking": "dynamic", "packing": "full-sentences", "mlm_probability": 0.15}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        name: of its directory.
        settings: of `train`, other than the baseline's.
        batch_factor: times the baseline's batch, at as many passes over the data. rate_factor: times its learning rate.
        parts: 1/parts of the training data are used.
        pairs: what is paired for next-sentence prediction, if anything.
        keeps_tokens: whether the batch grows until a step has as many tokens as the baseline's, as in the paper where
            sequences are not full.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    batch_factor: int = 1
    rate_factor: float = 1.0
    parts: int = 1
    pairs: Literal["segments", "sentences"] | None = None
    keeps_tokens: bool = False


@dataclass(frozen=True)
class Experiment:
    """Variants to compare.

    Attributes:
        title: of the report's section. note: what a reader must know to read the table.
        rows: label, variant, and the paper's figures for it.
        published: what those figures are. table: the paper's table that they stand in.
    """

    title: str
    note: str
    rows: Sequence[tuple[str, Variant, tuple[str, ...]]]
    published: tuple[str, ...] = ()
    table: str = ""

    @property
    def variants(self) -> list[Variant]:
        return [variant for _, variant, _ in self.rows]


BASELINE = Variant("baseline")
WITHOUT_NSP = [
    ("full sentences", BASELINE, ("90.4/79.1", "84.7", "92.5", "64.8")),
    (
        "doc sentences",
        Variant("doc-sentences", {"packing": "doc-sentences"}, keeps_tokens=True),
        ("90.6/79.7", "84.7", "92.7", "65.6"),
    ),
]

EXPERIMENTS = {
    "masking": Experiment(
        "Static and dynamic masking",
        "Static masks are the same in every pass. In the paper's static run each sequence has ten masks, and sees each of "
        "them four times.",
        [
            ("static", Variant("static-masking", {"masking": "static"}), ("78.3", "84.3", "92.5")),
            ("dynamic", BASELINE, ("78.7", "84.0", "92.9")),
        ],
        ("SQuAD 2.0", "MNLI-m", "SST-2"),
        "1",
    ),
    "nsp": Experiment(
        "Input format and next-sentence prediction",
        "Held-out loss is computed on full sentences for all, which the runs on pairs have not trained on. NSP accuracy is "
        "that of telling, for held-out pairs, whether the second part follows the first; guessing gives 50%.",
        [
            (
                "segment pairs + NSP",
                Variant("segment-pairs-nsp", pairs="segments", keeps_tokens=True),
                ("90.4/78.7", "84.0", "92.9", "64.2"),
            ),
            (
                "sentence pairs + NSP",
                Variant("sentence-pairs-nsp", pairs="sentences", keeps_tokens=True),
                ("88.7/76.2", "82.9", "92.1", "63.0"),
            ),
            *WITHOUT_NSP,
        ],
        ("SQuAD 1.1/2.0", "MNLI-m", "SST-2", "RACE"),
        "2",
    ),
    "batch-size": Experiment(
        "Batch size at equal passes over the data",
        "Batches and learning rates are in the paper's proportions: 256, 2K and 8K sequences at 1e-4, 7e-4 and 1e-3.",
        [
            ("1 x batch, 1 x rate", BASELINE, ("3.99", "84.7", "92.7")),
            (
                "8 x batch, 7 x rate",
                Variant("batch-x8", batch_factor=8, rate_factor=7.0),
                ("3.68", "85.2", "92.9"),
            ),
            (
                "32 x batch, 10 x rate",
                Variant("batch-x32", batch_factor=32, rate_factor=10.0),
                ("3.77", "84.6", "92.8"),
            ),
        ],
        ("perplexity", "MNLI-m", "SST-2"),
        "3",
    ),
    "data-size": Experiment(
        "Amount of data at equal steps",
        "The paper compares 16 GB with ten times as much, for a large model and 100K steps of 8K sequences.",
        [
            ("1/10", Variant("data-1-10", parts=10), ("93.6/87.3", "89.0", "95.3")),
            ("1/3", Variant("data-1-3", parts=3), ("-", "-", "-")),
            ("all", BASELINE, ("94.0/87.7", "89.3", "95.6")),
        ],
        ("SQuAD 1.1/2.0", "MNLI-m", "SST-2"),
        "4",
    ),
    "packing": Experiment(
        "Sequences across documents",
        "Sequences that end with their document are shorter; the batch is larger for it, so that a step has as many tokens.",
        WITHOUT_NSP,
        ("SQuAD 1.1/2.0", "MNLI-m", "SST-2", "RACE"),
        "2",
    ),
    "mlm-probability": Experiment(
        "Fraction of masked tokens",
        "All are evaluated with 15% masked. The paper keeps BERT's 15% and has no figures; Wettig et al. (arXiv 2202.08005) "
        "find 40% better for large models.",
        [
            ("10%", Variant("masked-10", {"mlm_probability": 0.1}), ()),
            ("15%", BASELINE, ()),
            ("20%", Variant("masked-20", {"mlm_probability": 0.2}), ()),
            ("40%", Variant("masked-40", {"mlm_probability": 0.4}), ()),
        ],
    ),
}
