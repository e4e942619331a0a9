"""One fine-tuning: transformers' model and Trainer, with the kernels put in and the loss of `finetune_loss`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  the Trainer needs it, and says so only when it is made
import numpy as np
import torch
import transformers
from fastroberta_kernels import huggingface
from torch.utils.data import SequentialSampler
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import NonFiniteError
from .examples import IGNORED_LABEL, Examples, count_tokens
from .finetune_loss import make_loss, weigh_classes
from .finetune_settings import FinetuneConfig
from .metrics import score_predictions
from .questions import choose_answers, choose_threshold, score_answers
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
    """Where and how to compute."""

    device: torch.device
    precision: str


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


def load_model(checkpoint: str, kind: str, labels: Sequence[str]) -> Any:
    """A transformers model with a new head, fp32, drawn from torch's generator."""
    model_class = getattr(transformers, MODELS.get(kind, "AutoModelForSequenceClassification"))
    more: dict[str, Any] = {"problem_type": PROBLEM_TYPES[kind]} if kind in PROBLEM_TYPES else {}
    if kind not in ("question-answering", "multiple-choice"):
        names = dict(enumerate(labels)) or {0: "value"}
        more |= {"num_labels": len(names), "id2label": names, "label2id": {name: n for n, name in names.items()}}
    return model_class.from_pretrained(checkpoint, dtype=torch.float32, ignore_mismatched_sizes=True, **more)


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
        return score_examples(task, labels, ordered, _join_logits(found.predictions))

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


def score_examples(
    task: Task, labels: Sequence[str], part: Examples, logits: np.ndarray, threshold: float | None = None
) -> dict[str, float]:
    """All metrics of a part; of question answering, also `no_answer_threshold`, chosen here if it is not given."""
    if task.kind != "question-answering":
        return score_predictions(task.kind, logits, stack_labels(part, logits), labels)
    answers = choose_answers(part, logits)
    if threshold is None:
        threshold = choose_threshold(part, answers)
    chosen = {"no_answer_threshold": threshold} if math.isfinite(threshold) else {}
    return score_answers(part, answers, threshold) | chosen


def stack_labels(part: Examples, logits: np.ndarray) -> np.ndarray:
    """The labels of all examples as an array; those of tokens padded to the logits' length."""
    values = [feature["labels"] for feature in part.features]
    if logits.ndim < 3:
        return np.array(values)
    expected = np.full(logits.shape[:2], IGNORED_LABEL)
    for row, labels in zip(expected, values):
        row[: len(labels)] = labels
    return expected


def _join_logits(found: Any) -> np.ndarray:
    """Logits (n, 2, l) of the starts and the ends of spans; others as they are."""
    return np.stack(found, axis=1) if isinstance(found, tuple) else found


def measure_speed(model: Any, features: list[dict[str, Any]], collate: Callable, batch_size: int, place: Place) -> dict:
    """Tokens per second of training with and without the kernels: forward and backward, the median of several batches.

    The model must have its original forwards; it leaves with them, and with no gradients.
    """
    ordered = sorted(features, key=count_tokens)
    middle = len(ordered) // 2  # batches of usual length, and without padding that would blur the comparison
    batch = collate(ordered[middle : middle + batch_size])
    batch = {name: tensor.to(place.device) for name, tensor in batch.items()}
    num_tokens = int(batch["attention_mask"].sum())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(place.precision)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    model.train()
    for turn in range(12):  # in turn, so that a busy machine slows both
        uses_kernels = turn % 2 == 0
        applied = huggingface.apply(model) if uses_kernels else None
        started = _read_clock(place.device)
        with torch.autocast(place.device.type, dtype, enabled=dtype is not None):
            outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        torch.stack([logits.float().square().mean() for logits in outputs.to_tuple()]).sum().backward()
        if turn >= 4:  # the first ones compile and warm up
            seconds[uses_kernels].append(_read_clock(place.device) - started)
        model.zero_grad()
        if applied:
            applied.revert()
    with_kernels, without = (num_tokens / float(np.median(seconds[uses])) for uses in (True, False))
    return {
        "tokens_per_second": round(with_kernels, 1),
        "tokens_per_second_without_kernels": round(without, 1),
        "ratio": round(with_kernels / without, 3),
    }


def _read_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
