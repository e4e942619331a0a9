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
from .cli.program import run
from .config import TrainConfig
from .log import check_trackers
from .plan import main as plan

QUICKSTART_VOCABULARY = 512
# How often an idle thread of PyTorch's looks for work before it sleeps. OpenMP's own 300,000 take milliseconds, in which it
# keeps a core from whoever it waits for; these take a fraction of one (bench/LOG.md, section 12).
SPINS = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        return plan([word for word in argv if word != "--plan"])  # with settings of its own
    config = parse_arguments(argv, TrainConfig, description=__doc__ or "", default_preset="quickstart")
    check_trackers(config.report_to)

    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))  # read by OpenMP when torch is imported
    # After the settings: importing torch takes a second that --help and a mistyped option should not.
    from .parallel.processes import join_processes, keep_freed_memory
    from .training.dry_run import rehearse
    from .training.trainer import Trainer

    processes = join_processes(config.device, config.hang_timeout)
    if processes.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        output_dir = Path(config.output_dir)
        if processes.is_first:
            if config.dry_run:
                check_directory(output_dir, "--output_dir")
            else:
                stack.enter_context(own_directory(output_dir, ".lock", "--output_dir"))
        if config.data is None:
            if config.dry_run and not (output_dir / "data" / "manifest.json").exists():
                output_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastroberta-")))
            config.data = [str(output_dir / "data")]
            if processes.is_first or config.dry_run:
                prepare_python_texts(output_dir / "data")
            processes.wait_for_all()
        trainer = Trainer(config, processes)
        if config.dry_run:
            rehearse(trainer)
        else:
            trainer.train()
    processes.leave()
    return 0


def prepare_python_texts(directory: Path) -> None:
    """Tokenize Python's own documentation into `directory`, once, with a tokenizer trained on it."""
    from .corpus.python_texts import write_python_texts
    from .prepare import main as prepare

    if not (directory / "manifest.json").exists():
        source = directory.parent / "python-texts.jsonl"
        write_python_texts(source)
        arguments = [str(source), "--out", str(directory), "--train-tokenizer", str(QUICKSTART_VOCABULARY)]
        status = prepare([*arguments, "--heldout-fraction", "0.05"])
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(run(main))
