"""The settings of the ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import setting
from ..errors import ConfigurationError


@dataclass
class AblateConfig:
    """One experiment, or all of them, on prepared data."""

    experiment: Literal["masking", "nsp", "batch-size", "data-size", "packing", "mlm-probability", "all"] = setting(
        help="what to vary: masking, nsp, batch-size, data-size, packing or mlm-probability; all: one after the other",
        positional=True,
    )
    data: str = setting(help="directory written by fastroberta.prepare, on which every variant trains")
    out: str = setting(
        "runs/ablations", "directory of the runs and the report; the same command continues an interrupted one"
    )
    preset: str | None = setting(
        None,
        "model and budget: small (minutes on a CPU), paper (RoBERTa-base, a million steps), or a preset or YAML file of "
        "train's settings; null: small on a CPU, paper on a GPU",
    )
    seed: int = setting(1, "first seed: of the initial weights, data order and masks", valid="[0, inf)")
    seeds: int = setting(
        1, "number of seeds; their spread is the noise that a difference must exceed", valid="[1, inf)"
    )
    task: (
        Literal["cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli", "squad", "squad2", "race"]
        | None
    ) = setting(None, "downstream task that every variant is fine-tuned for; null: none, or --task_train")
    task_data: str | None = setting(None, "directory of the task's files, as --data of fastroberta.finetune")
    task_train: str | None = setting(
        None, "own training data for the downstream task, as --train of fastroberta.finetune"
    )
    task_dev: str | None = setting(None, "own development data for it, on which the variants are scored")
    task_kind: Literal[
        "classification", "regression", "multi-label", "tokens", "question-answering", "multiple-choice"
    ] = setting("classification", "what own data ask for, as --kind of fastroberta.finetune")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train; auto: on a GPU if there is one")

    @property
    def has_task(self) -> bool:
        return self.task is not None or self.task_train is not None

    def check(self) -> None:
        """Refuse settings that do not fit together."""
        if self.task is not None and self.task_train is not None:
            raise ConfigurationError("task_train: --task brings its own data; drop one of the two")
        if (self.task is None) != (self.task_data is None):
            raise ConfigurationError("task and task_data belong together: the name of a task and its directory")
        if (self.task_train is None) != (self.task_dev is None):
            raise ConfigurationError("task_train and task_dev belong together: give both or neither")
