"""`python -m fastroberta.export CHECKPOINT OUT`: write a checkpoint as a Hugging Face model directory.

OUT gets what `AutoModelForMaskedLM`, `AutoTokenizer` and `pipeline("fill-mask")` load, and none of the optimizer's state.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cli.arguments import parse_arguments
from .cli.program import run
from .config import setting


@dataclass
class ExportConfig:
    """One export."""

    checkpoint: str = setting(help="checkpoint of this trainer, or a Hugging Face RoBERTa directory", positional=True)
    out: str = setting(help="directory to write; must be empty or not exist yet", positional=True)


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, ExportConfig, description=__doc__)
    from safetensors import SafetensorError

    from .checkpoint import verify_directory
    from .corpus.tokenizer import load_tokenizer
    from .errors import CheckpointError, ConfigurationError
    from .hf import load_huggingface, save_huggingface

    checkpoint, out = Path(config.checkpoint), Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"out: {out} exists and is not an empty directory; give another")
    verify_directory(checkpoint)
    model, tokenizer = load_huggingface(checkpoint), load_tokenizer(checkpoint)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        save_huggingface(model, tokenizer, partial)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written ({error}); make room, or give another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: ready for transformers' AutoModelForMaskedLM and AutoTokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
