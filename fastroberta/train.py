"""`python -m fastroberta.train`: pretrain RoBERTa from prepared text to a checkpoint that transformers loads.

Without arguments, a small model learns from the documentation that comes with Python, in minutes on a CPU. With `--config
roberta-base --data DIR`, the paper's recipe runs on a directory written by `python -m fastroberta.prepare`. A YAML file of
your own starts from defaults for a first run on one GPU: roberta-base's size, 10,000 steps of 256 sequences, learning rate
2.5e-4, 6% warm-up. Names in square brackets are fairseq's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cli.arguments import parse_arguments
from .cli.directories import check_directory, own_directory
from .cli.program import limit_spinning, run
from .config import TrainConfig
from .errors import DataError
from .log import check_trackers, print_line
from .plan import main as plan

QUICKSTART_VOCABULARY = 512


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        return plan([word for word in argv if word != "--plan"])  # with settings of its own
    config = parse_arguments(argv, TrainConfig, description=__doc__ or "", default_preset="quickstart")
    check_trackers(config.report_to)

    # As torchrun says it in the environment; PyTorch is not there yet.
    is_first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
    output_dir = Path(config.output_dir)
    with contextlib.ExitStack() as stack:
        if is_first and config.dry_run:
            check_directory(output_dir, "--output_dir")
        elif is_first:
            stack.enter_context(own_directory(output_dir, ".lock", "--output_dir"))
        if config.data is None:
            if config.dry_run and not (output_dir / "data" / "manifest.json").exists():
                output_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastroberta-")))
            config.data = [str(output_dir / "data")]
            if is_first or config.dry_run:
                prepare_python_texts(output_dir / "data")

        # PyTorch comes last. Importing it takes seconds, which --help and a mistyped option should not.
        limit_spinning()
        from .parallel.processes import join_processes, keep_freed_memory
        from .training.dry_run import rehearse
        from .training.trainer import Trainer

        processes = join_processes(config.device, config.hang_timeout)
        if processes.device.type == "cpu":
            keep_freed_memory()
        processes.wait_for_all()  # until the first one has prepared the data
        trainer = Trainer(config, processes)
        if config.dry_run:
            rehearse(trainer)
        else:
            trainer.train()
    processes.leave()
    return 0


def prepare_python_texts(directory: Path) -> None:
    """Tokenize Python's own documentation into `directory`, once, with a tokenizer trained on it."""
    if not (directory / "manifest.json").exists():
        print_line("reading the documentation that comes with Python", sys.stderr)
        from .corpus.python_texts import write_python_texts
        from .prepare import main as prepare

        source = directory.parent / "python-texts.jsonl"
        try:
            write_python_texts(source)
        except OSError as error:
            raise DataError(f"{source}: cannot be written ({error}); make room, and start again") from error
        arguments = [str(source), "--out", str(directory), "--train-tokenizer", str(QUICKSTART_VOCABULARY)]
        status = prepare([*arguments, "--heldout-fraction", "0.05"])
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(run(main))
