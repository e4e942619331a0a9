"""All nine tasks of GLUE, and the table of the RoBERTa paper with one more column."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .finetune_runs import RESULT, finetune
from .finetune_settings import FinetuneConfig
from .task import GLUE, find_glue_task

TABLE = "glue.md"
# Dev scores in per cent: BERT-large and RoBERTa-large of Liu et al. 2019, Table 5; RoBERTa-base of fairseq's
# examples/roberta. MNLI is matched and mismatched.
PUBLISHED: dict[str, tuple[str, str, str]] = {
    "MNLI": ("86.6/-", "87.6/-", "90.2/90.2"),
    "QNLI": ("92.3", "92.8", "94.7"),
    "QQP": ("91.3", "91.9", "92.2"),
    "RTE": ("70.4", "78.7", "86.6"),
    "SST-2": ("93.2", "94.8", "96.4"),
    "MRPC": ("88.0", "90.2", "90.9"),
    "CoLA": ("60.6", "63.6", "68.0"),
    "STS-B": ("90.0", "91.2", "92.4"),
    "WNLI": ("-", "-", "91.3"),
}
FROM_MNLI = ("RTE", "STS-B", "MRPC")  # small tasks that the paper starts from its model for MNLI


def run_glue(config: FinetuneConfig) -> str:
    """Fine-tune on each task, those with a result in its directory already left out; write and return the table.

    Raises:
        ConfigurationError: the directory holds a finished run. DataError: a task's files are missing, before any training.
    """
    out, data = Path(config.out), Path(config.data or "")
    if (out / TABLE).exists():
        raise ConfigurationError(f"out: {out} holds a finished run; give another directory")
    for name in PUBLISHED:
        find_glue_task(name, data)
    results: dict[str, dict[str, Any]] = {}
    for name in PUBLISHED:
        directory = out / name
        if (directory / RESULT).exists():
            results[name] = json.loads((directory / RESULT).read_text(encoding="utf-8"))
            continue
        checkpoint = str(out / "MNLI" / "model") if name in FROM_MNLI else config.checkpoint
        task: Any = name.lower()  # one of the Literal's
        results[name] = finetune(dataclasses.replace(config, task=task, out=str(directory), checkpoint=checkpoint))
    table = format_table(results)
    (out / TABLE).write_text(table, encoding="utf-8")
    return table


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table from the content of each task's result.json."""
    lines = [
        "| task | metric | this checkpoint | BERT-large | RoBERTa-base | RoBERTa-large |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, published in PUBLISHED.items():
        metric = GLUE[name][-1]
        ours = f"{100 * results[name]['median']:.1f}"
        if name == "MNLI":
            other = statistics.median(run["dev-mismatched"][metric] for run in results[name]["runs"])
            ours += f"/{100 * other:.1f}"
        lines.append(f"| {' | '.join([name, metric, ours, *published])} |")
    return "\n".join(lines) + "\n"
