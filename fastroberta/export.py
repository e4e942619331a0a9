"""`python -m fastroberta.export CHECKPOINT OUT`: a checkpoint as a directory that transformers or onnxruntime loads.

`--format huggingface` (a checkpoint of this trainer, or any masked LM that it can start from): what `AutoModelForMaskedLM`,
`AutoTokenizer` and `pipeline("fill-mask")` load, without the optimizer's state. `--format onnx` (also a fine-tuned
transformers directory): `model.onnx`, checked against PyTorch, and its tokenizer.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .cli.arguments import parse_arguments
from .cli.program import run
from .config import setting
from .errors import ConfigurationError


@dataclass
class ExportConfig:
    """One export."""

    checkpoint: str = setting(
        help="checkpoint of this trainer, or a Hugging Face directory", positional=True, path="model"
    )
    out: str = setting(help="directory to write; must be empty or not exist yet", positional=True, path="output")
    format: Literal["huggingface", "onnx"] = setting("huggingface", "for transformers, or for onnxruntime")
    quantize: Literal["none", "int8"] = setting("none", "how to store the weights of the ONNX file; none: as fp32")
    file: str | None = setting(
        None,
        "held-out data to compare int8 with fp32 on: texts, one per line, for a masked LM; of a fine-tuned model, a file "
        "like its dev data",
    )

    def check(self) -> None:
        """Refuse settings without effect."""
        if self.quantize != "none" and self.format != "onnx":
            raise ConfigurationError(f"quantize = {self.quantize}: only an ONNX file is quantized; add --format onnx")
        if self.file is not None and self.quantize == "none":
            raise ConfigurationError(f"file = {self.file}: held-out data are for int8 only; add --quantize int8")


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_arguments(argv, ExportConfig, description=__doc__)
    from safetensors import SafetensorError

    from .checkpoint import STATE, read_state, verify_directory
    from .corpus.tokenizer import load_tokenizer
    from .errors import CheckpointError
    from .hf import longest_sequence, read_config, read_pretrained, save_huggingface
    from .tasks.onnx_export import describe_report, export_onnx

    checkpoint, out = Path(config.checkpoint), Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"out: {out} exists and is not an empty directory; give another")
    trained = read_state(checkpoint)["config"] if (checkpoint / STATE).exists() else {}
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        if config.format == "onnx":
            report = export_onnx(checkpoint, partial, config.quantize == "int8", config.file)
            done = f"ready for onnxruntime\n{describe_report(report)}"
        else:
            verify_directory(checkpoint)
            pretrained = read_pretrained(checkpoint)
            save_huggingface(pretrained.build(), load_tokenizer(checkpoint), partial)
            notes = [f"{checkpoint}: {note}" for note in pretrained.notes]
            done = "\n".join(["ready for transformers' AutoModelForMaskedLM and AutoTokenizer", *notes])
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written ({error}); make room, or give another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {done}")
    if trained:
        sizes, content = read_config(checkpoint)
        longest = longest_sequence(sizes.max_position_embeddings, content["pad_token_id"])
        warn_of_untrained_positions(checkpoint, trained, longest)
    return 0


def warn_of_untrained_positions(checkpoint: Path, trained: dict[str, Any], longest: int) -> None:
    """Say on stderr if the model takes longer sequences than it was trained on.

    Args:
        trained: the settings it was trained with. longest: tokens of the longest sequence that it takes.
    """
    length = trained.get("max_seq_length")
    # A model to start from may have been trained on longer sequences.
    if length and length < longest and not trained.get("init_from"):
        print(
            f"{checkpoint}: takes texts of {longest} tokens but was trained on sequences of {length}; the positions beyond "
            f"are as initialized, so keep texts to {length} tokens",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run(main))
