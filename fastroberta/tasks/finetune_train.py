"""One fine-tuning: transformers' model and Trainer, with the kernels put in and the loss of `finetune_loss`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  the Trainer needs it, and says so only when it is made
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import CheckpointError, NonFiniteError
from .examples import Examples, count_tokens
from .finetune_loss import make_loss, weigh_classes
from .finetune_settings import FinetuneConfig
from .metrics import score_examples
from .task import Task

MODELS = {  # of the other kinds: AutoModelForSequenceClassification
    "tokens": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
}
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}


@dataclass(frozen=True)
class Place:
    """Where and how to compute: on which device, in which precision, and with or without this project's kernels."""

    device: torch.device
    precision: str
    kernels: bool = True

    @property
    def dtype(self) -> torch.dtype | None:
        """That of autocast; None without it."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    def __str__(self) -> str:
        return f"{self.precision} {'with' if self.kernels else 'without'} kernels"


class BucketTrainer(transformers.Trainer):
    """A Trainer that evaluates in the order given: its own sampler would shuffle what is grouped by length. For training,
    its own would take the number of choices for the length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        features: Any = train_dataset or self.train_dataset
        lengths = [count_tokens(feature) for feature in features]
        return LengthGroupedSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=lengths)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)


class Progress(transformers.TrainerCallback):
    """A line per epoch, and an error where the loss is not finite."""

    def __init__(self, name: str, metric: str) -> None:
        self.name, self.metric, self.loss = name, metric, math.nan

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise NonFiniteError(
                f"{self.name}: the loss is {logs['loss']} at step {state.global_step}; lower learning_rate, or take "
                "--precision fp32"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        value = more["metrics"][f"eval_{self.metric}"]
        before = state.best_metric
        best = ", the best so far" if before is None or value > before else ""
        print(
            f"{self.name}, epoch {round(state.epoch or 0)}: loss {self.loss:.4f}, dev {self.metric} {value:.4f}{best}",
            flush=True,
        )


def load_model(checkpoint: str, kind: str, labels: Sequence[str], **settings: Any) -> Any:
    """A transformers model in fp32 with a new head, drawn from torch's generator.

    Args:
        settings: of the model's configuration, over those of the checkpoint.
    Raises:
        CheckpointError: the weights cannot be read.
    """
    model_class = getattr(transformers, MODELS.get(kind, "AutoModelForSequenceClassification"))
    more: dict[str, Any] = settings | ({"problem_type": PROBLEM_TYPES[kind]} if kind in PROBLEM_TYPES else {})
    if kind not in ("question-answering", "multiple-choice"):
        names = dict(enumerate(labels)) or {0: "value"}
        more |= {"num_labels": len(names), "id2label": names, "label2id": {name: n for n, name in names.items()}}
    try:
        return model_class.from_pretrained(checkpoint, dtype=torch.float32, ignore_mismatched_sizes=True, **more)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be loaded ({error}); use another checkpoint") from error


def make_trainer(
    model: Any, train: Examples, dev: Examples, task: Task, labels: Sequence[str], config: FinetuneConfig,
    place: Place, collate: Callable, seed: int, directory: Path,
) -> BucketTrainer:  # fmt: skip
    """A Trainer by the paper's recipe: AdamW with a beta2 of 0.98 and no clipping, as fairseq's commands for it have."""
    micro = config.micro_batch_size or config.train_batch_size
    arguments = transformers.TrainingArguments(
        output_dir=str(directory / "epochs"),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=4 * micro,
        gradient_accumulation_steps=config.train_batch_size // micro,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=task.metric,
        greater_is_better=True,
        bf16=place.precision == "bf16",
        fp16=place.precision == "fp16",
        use_cpu=place.device.type == "cpu",
        dataloader_pin_memory=place.device.type == "cuda",
        seed=seed,
        logging_steps=max(1, math.ceil(len(train.features) / config.train_batch_size) // 50),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the Trainer would wrap the model in DataParallel
    weights = None
    if config.class_weights:
        weights = weigh_classes(task.kind, (feature["labels"] for feature in train.features), len(labels))
    ordered = dataclasses.replace(dev, features=sorted(dev.features, key=count_tokens, reverse=True))

    def compute_metrics(found: Any) -> dict[str, float]:
        return score_examples(task.kind, labels, ordered, _join_logits(found.predictions))

    trainer = BucketTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train.features,
        eval_dataset=ordered.features,
        compute_loss_func=make_loss(task.kind, weights, config.label_smoothing),
        compute_metrics=compute_metrics,
        callbacks=[transformers.EarlyStoppingCallback(config.patience), Progress(directory.name, task.metric)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def predict_logits(trainer: BucketTrainer, features: list[dict[str, Any]]) -> np.ndarray:
    """Logits of all examples in their order, computed in batches of similar length, without a look at their labels."""
    order = sorted(range(len(features)), key=lambda index: -count_tokens(features[index]))
    inputs: Any = [{"input_ids": features[index]["input_ids"]} for index in order]
    found = _join_logits(trainer.predict(inputs).predictions)
    logits = np.empty_like(found)
    logits[order] = found
    return logits


def _join_logits(found: Any) -> np.ndarray:
    """Logits (n, 2, l) of the starts and the ends of spans; others as they are."""
    return np.stack(found, axis=1) if isinstance(found, tuple) else found
