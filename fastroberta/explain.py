"""`python -m fastroberta.explain CHECKPOINT TEXT --out DIR`: what a prediction rests on, and what each head attends to.

For a masked LM (TEXT with one mask) and for a fine-tuned classifier. DIR gets `index.html`, one page without external
resources; `attention-layer-NN.png` with all heads of a layer; and `explanation.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cli.arguments import parse_arguments
from .cli.program import run
from .config import setting


@dataclass
class ExplainConfig:
    """One text to explain."""

    checkpoint: str = setting(
        help="checkpoint of this trainer, or a fine-tuned Hugging Face directory", positional=True, path="model"
    )
    text: str = setting(help="text to predict on; for a masked LM, with one mask", positional=True)
    out: str = setting(help="directory to write; must be empty or not exist yet", path="output")
    pair: str | None = setting(None, "second text, for a classifier of pairs")
    target: str | None = setting(None, "token or label to explain; null: the one predicted")
    steps: int = setting(50, "number of steps of the integral; more make it more exact", valid="[1, inf)")


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, ExplainConfig, description=__doc__)

    from .tasks.explanation import explain
    from .tasks.explanation_page import write_explanation

    explanation, attentions = explain(
        Path(config.checkpoint), config.text, pair=config.pair, target=config.target, steps=config.steps
    )
    write_explanation(Path(config.out), explanation, attentions)
    print(explanation.as_table())
    print(f"{config.out}: index.html, and a picture of each layer's attention")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
