"""Results as Markdown tables and charts, for the README.

Writes <name>.md and <name>-*.png beside a results file. A README that has the lines `<!-- benchmarks: begin -->` and
`<!-- benchmarks: end -->` gets the tables between them. If a file holds several runs, the newest measurement of each
thing counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import DIRECTORY, read_lines

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
OURS = "fastroberta"
# Measurements that agree in all of these are of the same thing, and the last one counts.
KEYS = {
    "kernel": ("operation", "setting", "shape", "implementation"),
    "train": ("model", "task", "implementation"),
    "growth": ("grows", "length", "sequences", "layers", "implementation"),
    "data": ("implementation", "sequences", "length"),
    "prepare": ("workers",),
    "tests": (),
}
OUR_COLOUR, OUR_LIGHT_COLOUR, PEER_COLOUR = "#1b6ca8", "#7fb2d9", "#9aa5b1"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="results; default: the newest of each device")
    files = parser.parse_args(argv).files or find_newest()
    if not files:
        print("no results yet: python -m bench all")
        return 1
    if importlib.util.find_spec("matplotlib") is None:
        print("the charts need matplotlib: pip install 'fastroberta[bench]'", file=sys.stderr)
        return 1
    for path in files:
        if not path.is_file():
            print(f"{path}: no such file; give results that python -m bench wrote", file=sys.stderr)
            return 1
    texts = []
    for path in files:
        results = read_results(path)
        text = write_tables(path, results)
        charts = draw_charts(path, results)
        text_for_readme = text + "".join(f"\n![{c.stem}](bench/results/{c.name})\n" for c in charts)
        texts.append(text_for_readme)
        path.with_suffix(".md").write_text(text_for_readme.replace("](bench/results/", "]("))
        print(text)
        print("\n".join(f"chart: {chart}" for chart in charts))
    if all(path.parent == DIRECTORY for path in files) and README.exists():
        put_into_readme("\n".join(texts))
    return 0


def find_newest() -> list[Path]:
    """The newest results file of each device, by the date in its name; GPUs first."""
    newest = {path.stem[:-11]: path for path in sorted(DIRECTORY.glob("*-????-??-??.jsonl"))}
    return [newest[name] for name in sorted(newest, key=lambda name: (name == "cpu", name))]


def read_results(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines by kind; in each, "run" is replaced by the line that describes the run."""
    runs: dict[str, dict[str, Any]] = {}
    latest: dict[tuple, dict[str, Any]] = {}
    for line in read_lines(path):
        if line["kind"] == "run":
            runs[line["run"]] = line
        elif line["kind"] == "ceilings":
            runs[line["run"]]["ceilings"] = line
        elif line["kind"] in KEYS and line.get("status") != "skipped":
            key = (line["kind"], *(str(line.get(name)) for name in KEYS[line["kind"]]))
            latest.pop(key, None)  # the newest goes to the end
            latest[key] = line | {"run": runs[line["run"]]}
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KEYS}
    for line in latest.values():
        results[line["kind"]].append(line)
    return results


def describe_setting(line: dict[str, Any]) -> str:
    setting = line["setting"]
    words = [line["operation"].replace("_", " "), f"({setting['model']}"]
    if setting["layout"] not in ("full", "plain"):
        words[-1] += f", {setting['layout']}"
    words[-1] += f", dropout {setting['dropout']})" if setting["dropout"] else ")"
    return " ".join(words)


def group_kernels(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(operation and setting, shape) -> implementation -> line."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((describe_setting(line), line["shape"]), {})[line["implementation"]] = line
    return groups


def total_seconds(line: dict[str, Any]) -> dict[str, float]:
    """Of forward and backward together, or of the forward if there is no backward."""
    return line["seconds"].get("both") or line["seconds"]["forward"]


def write_tables(path: Path, results: dict[str, list[dict[str, Any]]]) -> str:
    """The tables of a results file."""
    everything = [line for lines in results.values() for line in lines]
    if not everything:
        return f"No results in {path.name}.\n"
    machine = everything[-1]["run"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    commits = sorted({line["run"]["commit"][:12] + "+" * line["run"]["commit"].endswith("+") for line in everything})
    text = [
        f"### {machine['name']}" + ("" if machine["device"] == "cuda" else f", {machine['cpu']['cores']} cores"),
        "",
        f"`{machine['command']}`, commit {', '.join(commits)}, {machine['time'][:10]}; Python {machine['python']}, "
        f"{packages}; all of it in [{path.name}](bench/results/{path.name}). Medians, with quartiles in brackets; "
        '"against ours" is time over our time, taken in turn in one run.',
        "",
    ]
    for line in results["tests"]:
        text += [f"Tests on this GPU: {line['summary'].strip('= ')}", ""]
    for model, task in dict.fromkeys((line["model"], str(line["task"])) for line in results["train"]):
        lines = [line for line in results["train"] if line["model"] == model and str(line["task"]) == task]
        text += write_training(model, lines)
    kernels = group_kernels(results["kernel"])
    if kernels:
        text += [
            "| operation | shape | ours, ms | of the roofline | against ours |",
            "|---|---|---:|---:|---|",
        ]
    for (name, shape), lines in kernels.items():
        ours = lines.get(OURS)
        peers = []
        for peer, line in lines.items():
            if peer == OURS or line["status"] == "absent":
                continue
            shown = f"{line['ratio']['median']:.2f}x" if "ratio" in line else line["status"]
            peers.append(f"{peer} {shown}")
        if ours is None or "seconds" not in ours:
            mine = "" if ours is None else ours["status"]
            text.append(f"| {name} | {shape} | {mine} | | {', '.join(peers)} |")
            continue
        seconds = total_seconds(ours)
        text.append(
            f"| {name} | {shape} | {show_range(seconds, 1e3, ',.2f')} | {ours['share_of_roofline']:.0%} | "
            f"{', '.join(peers)} |"
        )
    absent = {
        f"{line['implementation']} ({line['reason']})"
        for line in results["kernel"] + results["train"]
        if line["status"] == "absent" and ("install" in line["reason"] or "version" in line["reason"])
    }
    if absent:
        text += ["", f"Not measured here: {', '.join(sorted(absent))}."]
    for line in results["prepare"]:
        text += [
            "",
            f"Preparing {line['megabytes']:.0f} MB of text with {line['workers']} processes: "
            f"{line['tokens_per_second_ratio']:.1f} times the tokens/s of datasets.map as in run_mlm.",
        ]
    if results["data"]:
        rates = [f"{line['implementation']} {line['tokens_per_second']['median']:,.0f}" for line in results["data"]]
        text += ["", f"Reading and masking alone, tokens/s: {', '.join(rates)}."]
    return "\n".join(text) + "\n"


def show_range(spread: dict[str, float], factor: float, form: str) -> str:
    """Median and quartiles."""
    median, low, high = (format(spread[name] * factor, form) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def write_training(model: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    task = lines[0]["task"]
    has_mfu = any(line.get("mfu") for line in lines)
    text = [
        f"Training roberta-{model}, {task['sequences']} x {task['length']} tokens a step, {task['precision']}, dropout "
        f"{task['dropout']}, fused AdamW:",
        "",
        f"| | tokens/s | {'MFU' if has_mfu else 'of the matmul rate'} | peak memory, GB | against ours |",
        "|---|---:|---:|---:|---:|",
    ]
    for line in lines:
        if "tokens_per_second" not in line or line["status"] != "ok":
            text.append(f"| {line['implementation']} | {line['status']}: {line.get('reason', '')} | | | |")
            continue
        share = line["mfu"] if has_mfu else line["share_of_matmul"]
        ratio = show_range(line["ratio"], 1, ".2f") if "ratio" in line else ""
        text.append(
            f"| {line['implementation']} | {show_range(line['tokens_per_second'], 1, ',.0f')} | {share:.0%} | "
            f"{line['peak_bytes'] / 1e9:.1f} | {ratio} |"
        )
    return [*text, ""]


def draw_charts(path: Path, results: dict[str, list[dict[str, Any]]]) -> list[Path]:
    """PNG files beside the results, one for each kind of result that is there."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    charts = []
    drawings = {"roofline": draw_roofline, "speed": draw_speed, "memory": draw_memory, "growth": draw_growth}
    for name, draw in drawings.items():
        figure = draw(plt, results)
        if figure is not None:
            chart = path.with_name(f"{path.stem}-{name}.png")
            figure.savefig(chart, bbox_inches="tight")
            plt.close(figure)
            charts.append(chart)
    return charts


def title_of(line: dict[str, Any], sizes: str) -> str:
    """A chart's title: the machine's name, CPU or GPU, precision, sizes and date."""
    run = line["run"]
    kind = "GPU" if run["device"] == "cuda" else f"CPU, {run['cpu']['cores']} cores"
    dtype = str(run.get("ceilings", {}).get("dtype", "")).removeprefix("torch.")
    precision = line.get("task", {}).get("precision") or {"bfloat16": "bf16", "float32": "fp32"}.get(dtype, dtype)
    words = [f"{run['name']} ({kind})", precision, sizes, run["time"][:10]]
    return ", ".join(word for word in words if word)


def draw_roofline(plt, results):
    """Our kernels against what the machine's memory and arithmetic allow."""
    lines = [line for line in results["kernel"] if line["implementation"] == OURS and line.get("seconds")]
    lines = [line for line in lines if line["flops_per_second"] > 0 or line["bytes_per_second"] > 0]
    if not lines:
        return None
    height = 0.8 + 0.26 * max(len(lines), 10)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), width_ratios=(1.4, 1), layout="constrained")
    ceilings = lines[-1]["run"]["ceilings"]
    copy, matmul = ceilings["copy_bytes_per_second"], ceilings["matmul_flops_per_second"]
    draw_roof(left, [line for line in lines if line["intensity"] > 0], copy, matmul)
    shares = [line["share_of_roofline"] * 100 for line in lines]
    bars = right.barh([describe_setting(line) for line in lines], shares, color=OUR_COLOUR)
    right.bar_label(bars, [f"{share:.0f}%" if share >= 1 else "under 1%" for share in shares], padding=3, fontsize=7)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.axvline(100, color="black", linewidth=1)
    right.set(xlabel="% of the roofline, forward and backward", title="All kernels", xlim=(0, max(110, *shares)))
    sizes = next((f"{line['shape'].split(',')[0]} tokens" for line in lines if line["operation"] == "attention"), "")
    figure.suptitle(
        f"{title_of(lines[-1], sizes)}\n{copy / 1e9:,.0f} GB/s copied, {matmul / 1e12:,.3g} TFLOP/s multiplied",
        fontsize=9,
    )
    return figure


def draw_roof(axis, lines, copy, matmul):
    """The ceilings of memory and of matrix products in FLOP/s against FLOP/byte, and below them each kernel by name."""
    lines = sorted(lines, key=lambda line: line["flops_per_second"], reverse=True)
    ridge = matmul / copy
    first = 10.0 ** math.floor(math.log10(min([ridge / 5, *(line["intensity"] for line in lines)])))
    # The names, at the right of their points, need half of the width.
    last = first * max(8 * ridge / first, *((line["intensity"] / first) ** 2 for line in lines), 1)
    x = [first, ridge, last]
    axis.loglog(x, [min(copy * value, matmul) / 1e12 for value in x], color="black", linewidth=1)
    middle = math.sqrt(first * ridge)
    axis.annotate("memory", (middle, copy * middle / 1e12), (8, -6), textcoords="offset points")
    axis.annotate("matrix products", (last, matmul / 1e12), (0, 3), textcoords="offset points", ha="right")
    low = 0.6 * min([first * copy, *(line["flops_per_second"] for line in lines)]) / 1e12
    high = 1.6 * matmul / 1e12
    label_at = 1.0  # height in the panel of the last name: the next one goes below it
    for line in lines:
        point = (line["intensity"], line["flops_per_second"] / 1e12)
        axis.plot(*point, "o", color=OUR_COLOUR, markersize=5)
        height = math.log(point[1] / low) / math.log(high / low)
        label_at = min(height, label_at - 0.05)
        shift = (label_at - height) * axis.figure.get_figheight() * 0.7 * 72
        axis.annotate(
            describe_setting(line), point, (6, shift), textcoords="offset points", fontsize=7, va="center",
            color=OUR_COLOUR,
        )  # fmt: skip
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ticks = [digit * 10**power for power in range(-4, 5) for digit in (1, 2, 5)]
    axis.set_yticks([tick for tick in ticks if low < tick < high])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()
    axis.set(
        xlabel="FLOP/byte", ylabel="TFLOP/s", title="Kernels with matrix products", xlim=(first, last), ylim=(low, high)
    )


def draw_bars(plt, results, value, label):
    """A bar for each trainer, or what became of it; a panel for each model, all on one scale."""
    lines = [line for line in results["train"] if line["status"] != "absent"]
    if not lines:
        return None
    models = list(dict.fromkeys((line["model"], str(line["task"])) for line in lines))
    heights = [sum((line["model"], str(line["task"])) == model for line in lines) for model in models]
    figure, axes = plt.subplots(
        len(models), 1, figsize=(7, 1.0 * len(models) + 0.3 * len(lines)), squeeze=False, height_ratios=heights,
        sharex=True, layout="constrained",
    )  # fmt: skip
    for axis, model in zip(axes[:, 0], models):
        chosen = [line for line in lines if (line["model"], str(line["task"])) == model]
        values = [value(line) if line["status"] == "ok" else 0.0 for line in chosen]
        form = ",.0f" if max(values) >= 100 else ".2f"
        labels = [format(one, form) if line["status"] == "ok" else line["status"] for one, line in zip(values, chosen)]
        colours = [colour_of(line["implementation"]) for line in chosen]
        bars = axis.barh([line["implementation"] for line in chosen], values, color=colours)
        axis.bar_label(bars, labels, padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        task = chosen[0]["task"]
        sizes = f"roberta-{model[0]}, {task['sequences']} x {task['length']} tokens per step, dropout {task['dropout']}"
        axis.set_title(title_of(chosen[-1], sizes), loc="right", fontsize=8)
    axes[-1, 0].set_xlabel(label)
    return figure


def colour_of(implementation: str) -> str:
    """Our colour for ours, a lighter shade of it for transformers with our kernels, grey for the rest."""
    if implementation.startswith(OURS):
        return OUR_COLOUR
    return OUR_LIGHT_COLOUR if "our kernels" in implementation else PEER_COLOUR


def draw_speed(plt, results):
    return draw_bars(plt, results, lambda line: line["tokens_per_second"]["median"], "tokens/s")


def draw_memory(plt, results):
    return draw_bars(plt, results, lambda line: line["peak_bytes"] / 1e9, "peak memory, GB")


def draw_growth(plt, results):
    """The time of a step against the sequence length, the batch and the number of layers."""
    lines = [line for line in results["growth"] if line["status"] == "ok"]
    kinds = list(dict.fromkeys(line["grows"] for line in lines))
    if not kinds:
        return None
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(3.2 * len(kinds), 3), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds):
        panel = [line for line in lines if line["grows"] == kind]
        for name in dict.fromkeys(line["implementation"] for line in lines):
            chosen = sorted((line for line in panel if line["implementation"] == name), key=lambda line: line[kind])
            x = [line[kind] for line in chosen]
            median, low, high = (
                [line["seconds_per_step"][which] * 1e3 for line in chosen] for which in ("median", "low", "high")
            )
            axis.plot(x, median, "o-", color=colour_of(name), label=name, markersize=4)
            axis.fill_between(x, low, high, color=colour_of(name), alpha=0.2, linewidth=0)
        first, tokens = panel[0], panel[0]["sequences"] * panel[0]["length"]
        axis.set_xlabel(
            {
                "length": f"tokens per sequence\n{tokens:,} tokens per step, {first['layers']} layers",
                "sequences": f"sequences per step\nof {first['length']} tokens, {first['layers']} layers",
                "layers": f"layers\n{first['sequences']} x {first['length']} tokens per step",
            }[kind]
        )
        axis.set_xticks(sorted({line[kind] for line in panel}))
        axis.tick_params(axis="x", labelsize=7)
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("ms per step; shaded: quartiles")
    axes[0][0].legend(frameon=False)
    figure.suptitle(title_of(lines[-1], "width of roberta-base"), fontsize=9)
    return figure


def put_into_readme(text: str) -> None:
    """Replace the text between the two marks; a README without them is left as it is."""
    content = README.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        return
    before, _, rest = content.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
    print(f"written into {README.name}")
