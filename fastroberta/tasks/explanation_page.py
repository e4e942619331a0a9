"""An explanation as pictures of attention and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ..errors import ConfigurationError, DataError
from .explanation import Explanation, show_token

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{target}: what the prediction rests on</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
.text {{ line-height: 2.2; }}
.text span {{ padding: .2rem .3rem; border-radius: .2rem; white-space: pre; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ padding: .15rem .7rem; text-align: left; white-space: pre; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>What the prediction rests on</h1>
<p>{checkpoint}</p>
<p class="text">{text}</p>
<p>Blue tokens speak for <b>{target}</b>, red ones against it. Its score is {output:+.3f} with the words and
{baseline:+.3f} with all of them hidden; the tokens share the difference (integrated gradients; {remainder:+.3f} is left
over by the numerical integral). {unit}</p>
<h2>Predictions</h2>
<table>{predictions}</table>
<h2>Shares</h2>
<table>{shares}</table>
<h2>Attention</h2>
<p>A row is a token that attends, a column one that is attended to; the darker, the more.</p>
{attention}
</body>
</html>
"""
MOST_LABELS = 48  # tokens of a picture that are still written out


def write_explanation(out: Path, explanation: Explanation, attentions: Sequence[Tensor]) -> None:
    """Write `index.html`, `explanation.json` and `attention-layer-NN.png` into a new directory, all of them or none.

    Args:
        attentions: of each layer, (heads, length, length).
    Raises:
        ConfigurationError: the directory is in use, or matplotlib is missing. DataError: it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"out: {out} exists and is not an empty directory; give another")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        pictures = []
        for number, layer in enumerate(attentions, 1):
            pictures.append(partial / f"attention-layer-{number:02}.png")
            draw_layer(pictures[-1], layer, explanation.tokens, f"Layer {number}")
        (partial / "index.html").write_text(make_page(explanation, pictures), encoding="utf-8")
        content = {**asdict(explanation), "remainder": explanation.remainder}
        (partial / "explanation.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); free some space, or give another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def draw_layer(path: Path, attention: Tensor, tokens: list[str], title: str) -> None:
    """One map for each head of a layer, (heads, length, length), on one scale; its square root shows small weights too."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("explain needs matplotlib; pip install 'fastroberta[explain]'") from error
    num_heads, length, _ = attention.shape
    columns = min(4, num_heads)
    rows = -(-num_heads // columns)
    side = min(6.0, max(2.4, 0.16 * length)) + 0.6
    figure = Figure(figsize=(columns * side, rows * side + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    scale = PowerNorm(0.5, vmin=0, vmax=float(attention.max()))
    panels = figure.subplots(rows, columns, squeeze=False)
    for head, panel in enumerate(panels.flat):
        if head >= num_heads:
            panel.axis("off")
            continue
        image = panel.imshow(attention[head].numpy(), cmap="Blues", norm=scale)
        panel.set_title(f"head {head + 1}", fontsize=9)
        if length <= MOST_LABELS:
            labels = [token if len(token) <= 14 else f"{token[:13]}…" for token in map(show_token, tokens)]
            # A $ in a token is no mathematics.
            panel.set_xticks(range(length), labels, rotation=90, fontsize=6, parse_math=False)
            panel.set_yticks(range(length), labels, fontsize=6, parse_math=False)
    figure.colorbar(image, ax=panels, shrink=0.6, label="attention")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a script that the font lacks: drawn as a box
        figure.savefig(path, dpi=110)


def make_page(explanation: Explanation, pictures: Sequence[Path]) -> str:
    """The page, with the pictures in it."""
    largest = max(map(abs, explanation.shares)) or 1.0
    text, shares = [], []
    for token, share in zip(explanation.tokens, explanation.shares):
        color = "66, 133, 244" if share > 0 else "219, 68, 55"
        style = f"background: rgba({color}, {0.75 * abs(share) / largest:.2f})"
        shown = html.escape(show_token(token))
        space = token[: len(token) - len(token.lstrip())] if token.strip() else ""
        text.append(f'{space}<span style="{style}" title="{share:+.3f}">{shown}</span>')
        shares.append(f'<tr><td class="number">{share:+.3f}</td><td style="{style}">{shown}</td></tr>')
    form = "{:.4f}" if explanation.is_regression else "{:.2%}"
    predictions = (
        f'<tr><td class="number">{form.format(score)}</td><td>{html.escape(show_token(name))}</td></tr>'
        for name, score in explanation.predictions
    )
    attention = (
        f'<img alt="Attention of the heads of layer {number}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for number, path in enumerate(pictures, 1)
    )
    return PAGE.format(
        target=html.escape(show_token(explanation.target)),
        checkpoint=html.escape(explanation.checkpoint),
        text="".join(text),
        output=explanation.output,
        baseline=explanation.baseline,
        remainder=explanation.remainder,
        unit="" if explanation.is_regression else "Scores are log-probabilities, in nats.",
        predictions="".join(predictions),
        shares="".join(shares),
        attention="\n".join(attention),
    )
