"""The settings of fine-tuning; the defaults are the RoBERTa paper's recipe for GLUE (Liu et al. 2019, Table 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import setting
from ..errors import ConfigurationError
from .task import METRICS


@dataclass
class FinetuneConfig:
    """One task, and how to train for it."""

    checkpoint: str = setting(
        help="checkpoint of this trainer, or a Hugging Face RoBERTa directory", positional=True, path="model"
    )
    out: str = setting(
        help="directory for the result; the same command continues an interrupted run there", path="output"
    )
    task: (
        Literal[
            "cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli", "squad", "squad2", "race", "glue"
        ]
        | None
    ) = setting(None, "task of GLUE, SQuAD 1.1 or 2.0, or RACE, read from its own files in --data; glue: all nine")
    data: str | None = setting(
        None,
        "directory of the task's files, for GLUE also that of all its tasks; null: fetched once from the Hugging Face hub",
    )
    train: str | None = setting(None, "own training data: .csv, .tsv, .jsonl, .parquet, .conll, or SQuAD's .json")
    dev: str | None = setting(None, "own development data, by which the best epoch is chosen")
    test: str | None = setting(None, "own test data, scored once at the end")
    predict: str | None = setting(None, "own data without labels, for predictions.tsv")
    kind: Literal["classification", "regression", "multi-label", "tokens", "question-answering", "multiple-choice"] = (
        setting(
            "classification",
            "what own data ask for: one label, a number, any number of labels (a list, or joined by commas), a tag per word,"
            " a span of the text, or one of the choices",
        )
    )
    text: str | None = setting(None, "column of the text; null: text, or words for tokens, or context for questions")
    pair: str | None = setting(None, "column of the second text of a pair, or of the question; null: none, or question")
    label: str | None = setting(None, "column of the label; null: label, or tags for tokens, or answers for questions")
    stride: int | None = setting(
        None, "tokens that windows over a long context share; null: a quarter of a window", valid="[0, inf)"
    )
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman", "exact"] | None = setting(
        None, "dev metric that chooses the best epoch and seed; null: that of GLUE's task, else the kind's usual one"
    )
    class_weights: bool = setting(False, "weight each class in the loss by its rarity in the training data")
    label_smoothing: float = setting(0.0, "share of each target spread evenly over the classes", valid="[0, 1)")
    max_seq_length: int | None = setting(
        None, "tokens at which texts are cut; null: as many as the model takes", valid="[3, inf)"
    )
    learning_rate: float = setting(2e-5, "peak learning rate; the paper tries 1e-5, 2e-5 and 3e-5", valid="(0, inf)")
    train_batch_size: int = setting(16, "examples per step; the paper tries 16 and 32", valid="[1, inf)")
    micro_batch_size: int | None = setting(
        None, "examples computed at once; null: the whole batch. Gradients are accumulated", valid="[1, inf)"
    )
    epochs: int = setting(10, "most passes over the training data", valid="[1, inf)")
    patience: int = setting(3, "epochs without a better dev metric after which training stops", valid="[1, inf)")
    warmup: float = setting(0.06, "share of the steps in which the learning rate rises", valid="[0, 1)")
    weight_decay: float = setting(0.1, "weight decay of AdamW", valid="[0, inf)")
    seed: int = setting(1, "first seed: of the head's weights, the order of examples, and dropout", valid="[0, inf)")
    seeds: int = setting(
        1, "number of seeds; the report gives their median, and the best model is kept", valid="[1, inf)"
    )
    search: Literal["grid", "optuna"] | None = setting(
        None, "search learning rate and batch size first: grid tries all pairs, optuna looks between them"
    )
    trials: int | None = setting(None, "most trials of the search; null: as many as the grid has", valid="[1, inf)")
    search_learning_rates: list[float] = setting(
        list, "learning rates to try, optuna from the lowest to the highest; []: 1e-5, 2e-5, 3e-5", valid="(0, inf)"
    )
    search_batch_sizes: list[int] = setting(list, "batch sizes to try; []: 16, 32", valid="[1, inf)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute; auto: on a GPU if there is one")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "precision of the matrix products; auto: the fastest here, by a short trial on a CPU"
    )
    kernels: bool | Literal["auto"] = setting(
        "auto", "whether to put this project's kernels into the model; auto: if training is faster so in a short trial"
    )

    def check(self) -> None:
        """Refuse settings that do not fit together."""
        own = ("train", "dev", "test", "predict", "text", "pair", "label")
        if (self.task is None) == (self.train is None):
            raise ConfigurationError("--task or --train is required, and not both: see --help")
        if self.task is not None:
            if given := [name for name in own if getattr(self, name) is not None]:
                raise ConfigurationError(f"{given[0]} is for own data, and --task {self.task} has its own; drop one")
            if self.task == "glue" and (self.metric or self.class_weights or self.label_smoothing):
                raise ConfigurationError(
                    "--task glue takes no metric, class_weights or label_smoothing: its tasks differ"
                )
        elif self.dev is None:
            raise ConfigurationError("--dev is required with --train: it decides which epoch is best")
        elif self.data is not None:
            raise ConfigurationError("data is for --task; own data are named by --train and --dev")
        else:
            self.check_kind(self.kind)
        if self.trials and not self.search:
            raise ConfigurationError(f"trials = {self.trials}: needs --search grid or optuna")
        self.search_learning_rates = self.search_learning_rates or [1e-5, 2e-5, 3e-5]
        self.search_batch_sizes = self.search_batch_sizes or [16, 32]
        sizes = self.search_batch_sizes if self.search else [self.train_batch_size]
        for size in sizes:
            if self.micro_batch_size and size % self.micro_batch_size:
                what = "search_batch_sizes" if self.search else "train_batch_size"
                raise ConfigurationError(f"micro_batch_size = {self.micro_batch_size}: must divide {what} = {size}")

    def check_kind(self, kind: str) -> None:
        """Refuse settings that do not fit the kind of the task, which --task decides too."""
        if self.metric is not None and self.metric not in METRICS[kind]:
            raise ConfigurationError(f"metric = {self.metric}: {kind} has {', '.join(METRICS[kind])}")
        if self.pair is not None and kind == "tokens":
            raise ConfigurationError("pair: token classification takes one text")
        if self.label_smoothing and kind in ("regression", "multi-label", "question-answering"):
            raise ConfigurationError(f"label_smoothing = {self.label_smoothing}: not for {kind}; drop it")
        if self.class_weights and kind in ("regression", "question-answering", "multiple-choice"):
            raise ConfigurationError(f"class_weights: {kind} has no classes; drop it")
        if self.stride is not None and kind != "question-answering":
            raise ConfigurationError(f"stride = {self.stride}: is for question-answering; drop it")
