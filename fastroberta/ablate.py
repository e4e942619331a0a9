"""`python -m fastroberta.ablate EXPERIMENT --data DIR`: the RoBERTa paper's experiments, at your own scale.

EXPERIMENT is masking, nsp, batch-size, data-size, packing, mlm-probability, or all. Every variant trains on the same
prepared data with the same budget. All are scored on the same held-out text under the same masks and, with --task or
--task_train, on a downstream task. report.md in --out has the tables, the chart and the paper's figures.

The same command continues an interrupted one; runs that several experiments share are trained once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

from .ablation.experiments import EXPERIMENTS
from .ablation.settings import AblateConfig
from .cli.arguments import parse_arguments
from .cli.directories import own_directory
from .cli.program import run
from .errors import ConfigurationError


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, AblateConfig, description=__doc__ or "")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("ablate runs in one process; start it without torchrun")

    try:
        from .ablation.report import collect_results, write_report
        from .ablation.runs import Ablation, list_runs
        from .parallel.processes import keep_freed_memory

        score_task = None
        if config.has_task:
            from .ablation import downstream

            score_task = functools.partial(downstream.score_task, downstream.configure_task(config))
    except ModuleNotFoundError as error:
        extra = "finetune" if config.has_task else "plot"
        raise ConfigurationError(f"ablate needs {error.name}; pip install 'fastroberta[{extra}]'") from error

    ablation = Ablation(config)
    if ablation.device.type == "cpu":
        keep_freed_memory()
    names = list(EXPERIMENTS) if config.experiment == "all" else [config.experiment]
    variants = [variant for name in names for variant in EXPERIMENTS[name].variants]
    with own_directory(ablation.out, ".lock", "--out"):
        runs = list_runs(variants, config)
        for variant, seed in runs:  # settings first: a run that does not fit is found before any training
            ablation.read_result(variant, seed)
            ablation.configure(variant, seed)
        for variant, seed in runs:
            ablation.run(variant, seed, score_task)
        path = write_report(ablation, collect_results(ablation))
    print(path.read_text(encoding="utf-8"))
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
