"""The downstream task of an ablation, through the product's fine-tuning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..cli.arguments import to_dict, validate
from ..errors import ConfigurationError
from ..tasks.examples import list_labels
from ..tasks.finetune_runs import RESULT, define_task, finetune
from ..tasks.finetune_settings import FinetuneConfig
from ..tasks.tables import read_table
from .settings import AblateConfig


def configure_task(config: AblateConfig) -> FinetuneConfig:
    """The fine-tuning that the settings ask for, of a checkpoint yet to be named.

    Raises:
        ConfigurationError, DataError: its files cannot be used; found before any training.
    """
    given = FinetuneConfig(
        checkpoint="-", out="-", task=config.task, data=config.task_data, train=config.task_train, dev=config.task_dev,
        kind=config.task_kind, device=config.device,
    )  # fmt: skip
    validate(given)
    task = define_task(given)
    tables = [read_table(path, task.header, task.of_glue) for path in (task.train, task.dev)]
    if task.kind not in ("question-answering", "multiple-choice"):
        list_labels(tables[0], task)
    return given


def score_task(given: FinetuneConfig, directory: Path, checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune a checkpoint in a directory, or read the result there: `name`, `metric`, `score`, and `examples`.

    Args:
        settings: of `finetune`, over its defaults.
    Raises:
        ConfigurationError: the directory holds a result with other settings.
    """
    config = dataclasses.replace(given, checkpoint=str(checkpoint), out=str(directory), **settings)
    validate(config)
    path = directory / RESULT
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        now = to_dict(config)
        if changed := [name for name in now if result["settings"].get(name) != now[name]]:
            raise ConfigurationError(
                f"out: {directory} holds a run with {changed[0]} = {result['settings'].get(changed[0])}; give another --out"
            )
    else:
        result = finetune(config)
    return {
        "name": result["task"],
        "metric": result["metric"],
        "score": result["median"],
        "examples": result["examples"],
    }
