"""The report of an ablation: for each experiment a table with the paper's figures beside ours, and one chart."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..cli.arguments import from_dict
from ..config import TrainConfig
from ..costs import num_parameters
from .experiments import EXPERIMENTS, SOURCE, Experiment
from .runs import Ablation

REPORT, CHART = "report.md", "report.png"
Results = dict[str, list[list[dict[str, Any]]]]  # name of an experiment -> for each row, the result of each seed


def collect_results(ablation: Ablation) -> Results:
    """The results of all experiments of which every run is finished, those of earlier commands included."""
    seeds = range(ablation.config.seed, ablation.config.seed + ablation.config.seeds)
    found: Results = {}
    for name, experiment in EXPERIMENTS.items():
        rows = [[ablation.read_result(variant, seed) for seed in seeds] for variant in experiment.variants]
        finished = [[result for result in row if result is not None] for row in rows]
        if finished == rows:
            found[name] = finished
    return found


def write_report(ablation: Ablation, results: Results) -> Path:
    """Write report.md and report.png into the ablation's directory, and return the former's path."""
    draw_chart(ablation.out / CHART, results)
    sections = [describe_setup(ablation, results), f"![All results]({CHART})"]
    sections += [format_section(EXPERIMENTS[name], rows) for name, rows in results.items()]
    path = ablation.out / REPORT
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def describe_setup(ablation: Ablation, results: Results) -> str:
    """What was trained on what, and how to read the tables."""
    base, seeds = ablation.base, ablation.config.seeds
    one = next(iter(results.values()))[0][0]
    model = from_dict(TrainConfig, one["settings"]).model
    manifest = ablation.manifest
    lines = [
        "# Ablations",
        "",
        f"Preset {ablation.preset}: {num_parameters(model):,} parameters, vocabulary {model.vocab_size:,}, sequences of "
        f"{base.max_seq_length} tokens. The baseline trains {base.max_steps:,} steps of {base.train_batch_size:,} sequences "
        f"on {manifest.count('train', 'tokens'):,} tokens ({manifest.count('train', 'documents'):,} documents) in "
        f"{one['settings']['precision']} on {ablation.device.type}.",
        "",
        f"Held-out loss is in nats per masked token, over {one['masked_tokens']:,} tokens, the same ones for all variants. "
        + (
            f"Figures are means of {seeds} seeds, ± half of the range between them."
            if seeds > 1
            else "There is one seed: how much of a difference is noise is not known."
        ),
    ]
    if task := one.get("task"):
        examples = ", ".join(f"{number:,} {part}" for part, number in task["examples"].items())
        lines += [
            "",
            f"Downstream: {task['name']}, {task['metric']} on the dev data in per cent ({examples} examples).",
        ]
    lines += ["", f"Columns marked * are the paper's ({SOURCE}), of its own models, data and budgets."]
    return "\n".join(lines)


def format_section(experiment: Experiment, rows: list[list[dict[str, Any]]]) -> str:
    """A heading, the note, a Markdown table, and how far seeds differ."""
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "steps x batch": lambda row: (
            f"{row[0]['settings']['max_steps']:,} x {row[0]['settings']['train_batch_size']:,}"
        ),
        "peak rate": lambda row: f"{row[0]['settings']['optimizer']['learning_rate']:g}",
        "passes": lambda row: f"{row[0]['passes']:.1f}",
        "held-out loss": lambda row: format_mean([one["loss"] for one in row], 3),
        "perplexity": lambda row: format_mean([one["perplexity"] for one in row], 1),
    }
    if any("nsp_accuracy" in one for row in rows for one in row):
        columns["NSP accuracy"] = lambda row: format_mean(
            [100 * x["nsp_accuracy"] for x in row if "nsp_accuracy" in x], 1
        )
    if all("task" in one for row in rows for one in row):
        task = rows[0][0]["task"]
        columns[f"{task['name']} {task['metric']}"] = lambda row: format_mean(
            [100 * x["task"]["score"] for x in row], 1
        )
    published = [f"{name}*" for name in experiment.published]
    lines = [
        f"| variant | {' | '.join([*columns, *published])} |",
        "|---|" + "---:|" * (len(columns) + len(published)),
    ]
    for (label, _, figures), row in zip(experiment.rows, rows):
        lines.append(f"| {' | '.join([label, *(show(row) for show in columns.values()), *figures])} |")
    parts = [f"## {experiment.title}", experiment.note, "\n".join(lines), describe_noise(rows)]
    if experiment.table:
        parts.append(f"\\* {SOURCE}, table {experiment.table}.")
    return "\n\n".join(parts)


def describe_noise(rows: list[list[dict[str, Any]]]) -> str:
    """A sentence on what the differences between variants can show."""
    losses = [[one["loss"] for one in row] for row in rows]
    means = [statistics.mean(row) for row in losses]
    between = max(means) - min(means)
    if len(losses[0]) == 1:
        return f"Variants differ by up to {between:.3f} nats."
    noise = max(max(row) - min(row) for row in losses)
    verdict = "more than noise" if between > 2 * noise else "no clear effect"
    return f"Seeds of a variant differ by up to {noise:.3f} nats, variants by up to {between:.3f}: {verdict}."


def format_mean(values: list[float], digits: int) -> str:
    """The mean, and half of the range if there are several values; a dash if there is none."""
    if not values:
        return "-"
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def draw_chart(path: Path, results: Results) -> None:
    """A row for each experiment: held-out loss of its variants, and beside it the downstream score, as PNG.

    Each dot is a seed, each bar the mean. All experiments share their axes, so that noise does not look like an effect.
    """
    has_task = all("task" in one for rows in results.values() for row in rows for one in row)
    heights = [len(rows) + 1 for rows in results.values()]
    figure = Figure(figsize=(9 if has_task else 6, 0.42 * sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(
        len(results), 1 + has_task, sharex="col", squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (name, rows), panels in zip(results.items(), grid):
        labels = [label for label, _, _ in EXPERIMENTS[name].rows]
        values = [[[one["loss"] for one in row] for row in rows]]
        if has_task:
            values.append([[100 * one["task"]["score"] for one in row] for row in rows])
        for axes, columns, color in zip(panels, values, ("#4c78a8", "#54a24b")):
            for place, seeds in enumerate(columns):
                axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=5, alpha=0.8)
                axes.plot([statistics.mean(seeds)], [place], "|", color=color, markersize=14, markeredgewidth=2)
            axes.set(yticks=range(len(labels)), ylim=(len(labels) - 0.5, -0.5))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
        panels[0].set_yticklabels(labels)
        panels[0].set_title(EXPERIMENTS[name].title, loc="left", fontsize=10)
        for axes in panels[1:]:
            axes.set_yticklabels([])
    grid[-1][0].set_xlabel("held-out loss, nats per masked token (lower is better)")
    if has_task:
        task = next(iter(results.values()))[0][0]["task"]
        grid[-1][1].set_xlabel(f"{task['name']}, dev {task['metric']}, per cent (higher is better)")
    figure.savefig(path, dpi=130)
