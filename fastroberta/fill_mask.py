"""`python -m fastroberta.fill_mask CHECKPOINT "The capital of France is <mask>."`: predict masked words.

Texts come from the command line, from a file with one text per line, or from standard input.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .cli.arguments import parse_arguments
from .cli.program import run
from .config import setting
from .errors import ConfigurationError


@dataclass
class FillMaskConfig:
    """Masks to fill in."""

    checkpoint: str = setting(
        help="checkpoint of this trainer, or a Hugging Face RoBERTa directory", positional=True, path="model"
    )
    texts: list[str] = setting(list, "texts with masks; without any, lines of standard input", positional=True)
    file: str | None = setting(None, "file with one text per line; - for standard input")
    top_k: int = setting(5, "number of predictions for each mask", valid="[1, inf)")
    format: Literal["table", "jsonl"] = setting(
        "table", "how to print predictions: for people, or one JSON object per text"
    )
    batch_tokens: int = setting(16384, "number of tokens per batch, padding included", valid="[1, inf)")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute; auto: on a GPU if there is one")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "precision of the matrix products; auto: the one that this device multiplies fastest in"
    )
    demo: bool = setting(False, "serve a page to try the model in a browser, on this machine only")
    port: int = setting(8000, "port of the page; 0 takes a free one", valid="[0, 65535]")

    def check(self) -> None:
        """Refuse texts that nobody would read."""
        if self.demo and (self.texts or self.file):
            raise ConfigurationError("demo takes its texts from the browser: leave out --demo, or the texts and --file")


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, FillMaskConfig, description=__doc__ or "")

    from .tasks.demo import serve
    from .tasks.fill import MaskFiller
    from .tasks.inference import load_encoder
    from .tasks.texts import read_texts

    filler = MaskFiller(*load_encoder(config.checkpoint, config.device, config.precision), config.batch_tokens)
    if config.demo:
        serve(lambda text: filler.fill([text], config.top_k)[0], config.checkpoint, filler.mask_token, config.port)
        return 0
    texts = read_texts(config.texts, config.file)
    started = time.perf_counter()
    filled = filler.fill(texts, config.top_k)
    seconds = time.perf_counter() - started
    for one in filled:
        if config.format == "jsonl":
            print(json.dumps(dataclasses.asdict(one), ensure_ascii=False))
        else:
            print(one.as_table())
    plural = "s" * (len(texts) > 1)
    rate = f"{filler.num_tokens / seconds:,.0f} tokens/s"
    print(f"{filler.num_tokens:,} tokens in {len(texts):,} text{plural}: {rate}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
