"""The loss curve of a run, as a line of text and as a picture."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ..config import TrainConfig

BLOCKS = "▁▂▃▄▅▆▇█"


def read_losses(output_dir: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, `train/loss` or `eval/loss`, from a run's metrics.jsonl; null values are left out."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_sparkline(values: list[float], width: int = 60) -> str:
    """The values as blocks of eight heights, the highest for the largest; more than `width` are thinned out."""
    if not values:
        return ""
    if len(values) > width:
        values = [values[index * (len(values) - 1) // (width - 1)] for index in range(width)]
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def draw_losses(output_dir: Path, title: str, entropy: float) -> Path | None:
    """Write loss.png into a run's directory: training and held-out loss over steps. None if it cannot.

    Args:
        entropy: of the held-out tokens' frequencies, in nats: the loss of a model that knows nothing else.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*read_losses(output_dir, "train/loss"), color="#4c78a8", label="training")
    axes.plot(*read_losses(output_dir, "eval/loss"), "o", color="#e45756", label="held-out")
    axes.axhline(entropy, color="#999999", linewidth=1, linestyle="--", label="token frequencies alone")
    axes.set(xlabel="step", ylabel="loss, nats per masked token")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = output_dir / "loss.png"
    try:
        figure.savefig(path, dpi=150)
    except OSError:  # the run is done and its checkpoint saved; a full disk costs only the picture
        return None
    return path


def show_losses(config: TrainConfig, on_gpu: bool, entropy: float) -> str:
    """The loss curve in a line of text, which names the picture that is also drawn, if it can be."""
    output_dir, model = Path(config.output_dir), config.model
    _, losses = read_losses(output_dir, "train/loss")
    title = (
        f"{output_dir.name}: {model.num_hidden_layers} layers of {model.hidden_size}, {config.train_batch_size:,} x "
        f"{config.max_seq_length} tokens per step, {'GPU' if on_gpu else 'CPU'}, {config.precision}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    picture = draw_losses(output_dir, title, entropy)
    return f"loss: {draw_sparkline(losses)}" + (f"  ({picture})" if picture else "")
