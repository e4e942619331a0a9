"""A search over learning rates and batch sizes, with a line in trials.jsonl for each trial, from which it continues."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from ..errors import DataError
from .finetune_settings import FinetuneConfig

TRIALS = "trials.jsonl"


def search_settings(
    config: FinetuneConfig, metric: str, out: Path, train: Callable[[FinetuneConfig, Path], dict[str, Any]]
) -> FinetuneConfig:
    """The settings of the best trial, whose model and scores are left as those of the first seed.

    Args:
        metric: of `dev` in what `train` returns; the higher, the better. train: one training into a directory.
    Raises:
        DataError: trials.jsonl is damaged.
    """
    trials = read_trials(out)
    grid = list(itertools.product(config.search_learning_rates, config.search_batch_sizes))
    count = config.trials or len(grid)
    for number in range(len(trials), count if config.search == "optuna" else min(count, len(grid))):
        rate, size = _sample(config, trials) if config.search == "optuna" else grid[number]
        trial: dict[str, Any] = {"trial": number + 1, "learning_rate": rate, "train_batch_size": size}
        print(f"trial {number + 1} of {count}: learning_rate {rate:.3g}, train_batch_size {size}", flush=True)
        result = train(_adopt(config, trial), out / f"trial-{number + 1}")
        trials.append(trial | {"value": result["dev"][metric], "dev": result["dev"], "seconds": result["seconds"]})
        with (out / TRIALS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(trials[-1]) + "\n")
        best = _find_best(trials)
        for one in trials:  # only the best model is worth its disk
            if one is not best:
                shutil.rmtree(out / f"trial-{one['trial']}" / "model", ignore_errors=True)
    best = _find_best(trials)
    found = out / f"trial-{best['trial']}"
    if found.exists():
        found.replace(out / f"seed-{config.seed}")
    print(f"best of {len(trials)} trials: number {best['trial']}, dev {metric} {best['value']:.4f}", flush=True)
    return _adopt(config, best)


def _adopt(config: FinetuneConfig, trial: dict[str, Any]) -> FinetuneConfig:
    return dataclasses.replace(config, learning_rate=trial["learning_rate"], train_batch_size=trial["train_batch_size"])


def _find_best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    return max(trials, key=lambda trial: trial["value"])


def _sample(config: FinetuneConfig, trials: list[dict[str, Any]]) -> tuple[float, int]:
    """The next trial by Optuna's tree-structured Parzen estimator, the same whether or not the search was interrupted."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rates = config.search_learning_rates
    space: dict[str, Any] = {
        "learning_rate": optuna.distributions.FloatDistribution(min(rates), max(rates), log=True),
        "train_batch_size": optuna.distributions.CategoricalDistribution(config.search_batch_sizes),
    }
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed + len(trials), n_startup_trials=5)
    )
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                params={name: trial[name] for name in space}, distributions=space, value=trial["value"]
            )
        )
    asked = study.ask(space)
    return asked.params["learning_rate"], asked.params["train_batch_size"]


def read_trials(out: Path) -> list[dict[str, Any]]:
    """The finished trials; a last line that was cut off while it was written counts as none.

    Raises:
        DataError: trials.jsonl is damaged.
    """
    path = out / TRIALS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    trials = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            trial = json.loads(line)
            if trial["trial"] != number or not math.isfinite(trial["value"]):
                raise ValueError(f"trial {number} is expected here")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a trial ({error}); fix the line, or give another --out") from error
        trials.append(trial)
    return trials
