"""`python -m fastroberta.finetune CHECKPOINT --task sst-2 --data glue --out result`: fine-tune a checkpoint on a task.

GLUE's tasks, SQuAD and RACE come by name, with their own files, columns and metrics (--task, --data). Own data come as
csv, tsv, jsonl, parquet or CoNLL columns (--train, --dev, --kind). The defaults are the RoBERTa paper's recipe for GLUE.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli.arguments import parse_arguments
from .cli.program import limit_spinning, run
from .errors import ConfigurationError
from .tasks.finetune_settings import FinetuneConfig


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, FinetuneConfig, description=__doc__ or "")

    limit_spinning()
    try:
        from .tasks.finetune_runs import finetune
        from .tasks.glue_suite import run_glue
        from .tasks.hub import download_task
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"finetune needs {error.name}; pip install 'fastroberta[finetune]'") from error

    if config.task is not None and config.data is None:
        config.data = f"{config.out}-data"  # not inside: a run begins in an empty directory
        download_task(config.task, Path(config.data))
    if config.task == "glue":
        print(run_glue(config), end="")
        return 0
    result = finetune(config)
    metric = result["metric"]
    for one in result["runs"]:
        scores = "; ".join(
            f"{name} " + ", ".join(f"{key} {value:.4f}" for key, value in one[name].items())
            for name in one
            if isinstance(one[name], dict)
        )
        print(f"seed {one['seed']}: epoch {one['best_epoch']} of {one['epochs']}; {scores}")
    median = f", the median of {len(result['runs'])} seeds" if len(result["runs"]) > 1 else ""
    print(f"{config.out}: dev {metric} {result['median']:.4f}{median}; the model is in {config.out}/model")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
