"""`python -m fastroberta.export CHECKPOINT OUT`: a Hugging Face model directory from a checkpoint of this trainer.

OUT gets what `AutoModelForMaskedLM`, `AutoTokenizer` and `pipeline("fill-mask")` load, and none of the optimizer's state.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .arguments import parse_arguments, run
from .config import setting


@dataclass
class ExportConfig:
    """One export."""

    checkpoint: str = setting(help="checkpoint of this trainer, or a Hugging Face RoBERTa directory", positional=True)
    out: str = setting(help="directory to write; must not exist or be empty", positional=True)


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, ExportConfig, description=__doc__)
    from .checkpoint import MANIFEST, verify_checkpoint
    from .errors import ConfigurationError
    from .hf import load_huggingface, save_huggingface
    from .tokenizer import load_tokenizer

    checkpoint, out = Path(config.checkpoint), Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"out: {out} exists and is not an empty directory; give another")
    if (checkpoint / MANIFEST).exists():
        verify_checkpoint(checkpoint)
    save_huggingface(load_huggingface(checkpoint), load_tokenizer(checkpoint), out)
    print(f"{out}: ready for transformers' AutoModelForMaskedLM and AutoTokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
