"""A fine-tuning from checkpoint and files to the result: data checked first, then one training per seed, then a report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from fastroberta_kernels import huggingface
from tokenizers import Tokenizer

from ..checkpoint import verify_directory
from ..cli.arguments import to_dict
from ..corpus.tokenizer import load_tokenizer, save_tokenizer, special_token_ids
from ..errors import ConfigurationError, DeviceMemoryError
from ..hf import longest_sequence, read_config
from ..parallel.processes import keep_freed_memory, select_device
from .choices import LETTERS
from .encoding import encode_examples
from .examples import Examples, list_labels, make_collate
from .finetune_report import draw_confusion, draw_curves, write_predictions
from .finetune_search import read_trials, search_settings
from .finetune_settings import FinetuneConfig
from .finetune_speed import choose_place, describe_choice
from .finetune_train import Place, load_model, make_trainer, predict_logits
from .metrics import list_predictions, score_examples, stack_labels
from .tables import read_table
from .task import COLUMNS, METRICS, Task, find_task, save_task

RESULT = "result.json"
SETTINGS = "settings.json"
CHOSEN = "chosen"  # in SETTINGS, beside the settings: how the run computes


@dataclass(frozen=True)
class Data:
    """Everything that is read before training.

    Attributes:
        examples: `train`, `dev`, names of what is scored beside them, and of outputs to predict.
        num_skipped: broken lines of GLUE's files.
    """

    task: Task
    labels: list[str]
    tokenizer: Tokenizer
    max_length: int
    examples: dict[str, Examples]
    num_skipped: int


def define_task(config: FinetuneConfig) -> Task:
    """The task that the settings name, with its own files or the user's."""
    if config.task is not None:
        task = find_task(config.task, Path(config.data or ""))
        config.check_kind(task.kind)
        return dataclasses.replace(task, metric=config.metric or task.metric)
    text, pair, label = COLUMNS.get(config.kind, ("text", None, "label"))
    return Task(
        name=Path(config.train or "").stem,
        kind=config.kind,
        text=config.text or text,
        pair=config.pair or pair,
        label=config.label or label,
        metric=config.metric or METRICS[config.kind][0],
        train=Path(config.train or ""),
        dev=Path(config.dev or ""),
        scored={"test": Path(config.test)} if config.test else {},
        predicted={"predictions": Path(config.predict)} if config.predict else {},
    )


def read_data(config: FinetuneConfig) -> Data:
    """Check the checkpoint, read and tokenize all files.

    Raises:
        CheckpointError, ConfigurationError, DataError: in one line, what cannot be used.
    """
    checkpoint = Path(config.checkpoint)
    verify_directory(checkpoint)
    model_config, content = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    longest = longest_sequence(model_config.max_position_embeddings, content["pad_token_id"])
    if config.max_seq_length is not None and config.max_seq_length > longest:
        raise ConfigurationError(f"max_seq_length = {config.max_seq_length}: {checkpoint} takes {longest} at most")
    max_length = config.max_seq_length or longest
    task = define_task(config)
    # A line left out of a file to predict would shift the index of all after it.
    tables = {
        name: read_table(
            path, task.header if name in ("train", "dev") else None, task.of_glue and name not in task.predicted
        )
        for name, path in {"train": task.train, "dev": task.dev, **task.scored, **task.predicted}.items()
    }
    labels = list_labels(tables["train"], task)
    examples = {
        name: encode_examples(
            table, task, tokenizer, labels, max_length, config.stride, with_label=name not in task.predicted
        )
        for name, table in tables.items()
    }
    if task.kind == "multiple-choice":
        labels = list(LETTERS[: max(len(feature["input_ids"]) for feature in examples["train"].features)])
    return Data(task, labels, tokenizer, max_length, examples, sum(table.num_skipped for table in tables.values()))


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train with every seed, keep the best model, write and return the content of result.json."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("finetune runs in one process; start it without torchrun")
    device = select_device(config.device)
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigurationError("precision = fp16: needs a GPU; take bf16, fp32 or auto")
    data = read_data(config)
    if device.type == "cpu":
        keep_freed_memory()
    out = Path(config.out)
    chosen = _claim(out, config)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(_describe(data), flush=True)
    collate = make_collate(special_token_ids(data.tokenizer).pad, 8 if device.type == "cuda" else 1)
    if not chosen or chosen["device"] != str(device):  # else an interrupted run, which goes on as it began
        train_part = data.examples["train"]
        place, why, speeds = _guard_memory(
            lambda: choose_place(config, device, data.task.kind, data.labels, train_part, collate)
        )
        how = {"precision": place.precision, "kernels": place.kernels, "why": why, "speeds": speeds}
        chosen = {"device": str(device), **how}
        _write_json(out / SETTINGS, {**to_dict(config), CHOSEN: chosen})
    place = Place(device, chosen["precision"], chosen["kernels"])
    print(describe_choice(place, chosen["why"], chosen["speeds"]), flush=True)
    if config.search:

        def train(tried: FinetuneConfig, directory: Path) -> dict[str, Any]:
            return run_seed(tried, data, place, collate, tried.seed, directory)

        config = search_settings(config, data.task.metric, out, train)
    runs: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        directory = out / f"seed-{seed}"
        if (directory / RESULT).exists():
            runs.append(json.loads((directory / RESULT).read_text(encoding="utf-8")))
        else:
            runs.append(run_seed(config, data, place, collate, seed, directory))
        best = max(runs, key=lambda run: run["dev"][data.task.metric])
        for run in runs:  # only the best model is worth its disk
            if run is not best:
                shutil.rmtree(out / f"seed-{run['seed']}" / "model", ignore_errors=True)
    for path in (out / f"seed-{best['seed']}").iterdir():
        if path.name != RESULT:
            shutil.rmtree(out / path.name, ignore_errors=True)
            path.replace(out / path.name)
    result = {
        "task": data.task.name,
        "kind": data.task.kind,
        "checkpoint": config.checkpoint,
        "metric": data.task.metric,
        "median": statistics.median(run["dev"][data.task.metric] for run in runs),
        "best_seed": best["seed"],
        "labels": data.labels,
        "examples": {name: len(part.features) for name, part in data.examples.items()},
        "truncated": {name: part.num_truncated for name, part in data.examples.items() if part.num_truncated},
        "skipped_lines": data.num_skipped,
        **chosen,
        "settings": to_dict(config),
        **({"trials": read_trials(out)} if config.search else {}),
        "runs": runs,
    }
    _write_json(out / RESULT, result)
    return result


def run_seed(
    config: FinetuneConfig, data: Data, place: Place, collate: Callable, seed: int, directory: Path
) -> dict[str, Any]:
    """One training: its model and pictures go to `directory`, and its scores, last, to result.json there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    started = time.perf_counter()
    task, examples = data.task, data.examples
    transformers.set_seed(seed)
    model = load_model(config.checkpoint, task.kind, data.labels)
    applied = huggingface.apply(model) if place.kernels else None
    trainer = make_trainer(
        model, examples["train"], examples["dev"], task, data.labels, config, place, collate, seed, directory
    )
    _guard_memory(trainer.train)
    scores: dict[str, dict[str, float]] = {}
    for name, part in examples.items():
        if name == "train":
            continue
        logits = predict_logits(trainer, part.features)
        threshold = scores["dev"].get("no_answer_threshold", math.inf) if scores else None
        if name not in task.predicted:
            scores[name] = score_examples(task.kind, data.labels, part, logits, threshold)
        if name in (task.predicted or ["test" if "test" in task.scored else "dev"]):
            path = directory / f"{name if name in task.predicted else 'predictions'}.tsv"
            threshold = scores["dev"].get("no_answer_threshold")
            write_predictions(path, list_predictions(task.kind, data.labels, part, logits, threshold), part)
        if name == "dev" and task.kind in ("classification", "regression"):
            title = f"{task.name}, dev: {task.metric} {scores[name][task.metric]:.3f}"
            expected = stack_labels(part, logits)
            draw_confusion(directory / "confusion.png", task.kind, logits, expected, data.labels, title)
    history = trainer.state.log_history
    draw_curves(directory / "curves.png", history, task.metric, f"{task.name}, seed {seed}")
    if applied:
        applied.revert()
    model.save_pretrained(directory / "model")
    save_tokenizer(data.tokenizer, directory / "model", model_max_length=data.max_length)
    save_task(task, directory / "model", data.max_length, config.stride, scores["dev"].get("no_answer_threshold"))
    result = {
        "seed": seed,
        "best_epoch": max(_list_epochs(history, task.metric), key=lambda epoch: epoch[1])[0],
        "epochs": len(_list_epochs(history, task.metric)),
        "dev": scores.pop("dev"),
        **scores,
        "seconds": round(time.perf_counter() - started, 1),
    }
    shutil.rmtree(directory / "epochs", ignore_errors=True)
    _write_json(directory / RESULT, result)
    return result


def _claim(out: Path, config: FinetuneConfig) -> dict[str, Any] | None:
    """Note the settings in the directory, or find the same ones there from an interrupted run; the choice that it made."""
    if (out / RESULT).exists():
        raise ConfigurationError(f"out: {out} holds a finished run; give another directory")
    settings = to_dict(config)
    if (out / SETTINGS).exists():
        before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        if changed := [key for key in settings if before.get(key) != settings[key]]:
            raise ConfigurationError(
                f"out: {out} holds a run with {changed[0]} = {before.get(changed[0])}; give another directory"
            )
        return before.get(CHOSEN)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"out: {out} exists and is not an empty directory; give another")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / SETTINGS, settings)
    return None


def _describe(data: Data) -> str:
    sizes = ", ".join(f"{len(part.features):,} {name}" for name, part in data.examples.items())
    cut = sum(part.num_truncated for part in data.examples.values())
    lines = [f"{data.task.name}: {sizes}"]
    if cut:
        lines.append(f"{cut:,} examples are longer than {data.max_length} tokens and are cut there")
    if data.num_skipped:
        lines.append(f"{data.num_skipped:,} lines have too few or too many fields and are left out")
    return "\n".join(lines)


def _list_epochs(history: list[dict[str, float]], metric: str) -> list[tuple[int, float]]:
    return [(round(entry["epoch"]), entry[f"eval_{metric}"]) for entry in history if f"eval_{metric}" in entry]


def _guard_memory(train: Callable[[], Any]) -> Any:
    try:
        return train()
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            "training: the GPU has too little memory; give a smaller micro_batch_size, or a smaller max_seq_length"
        ) from error


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
