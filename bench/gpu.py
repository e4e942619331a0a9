"""A GPU's first minutes: are the kernels right, how fast are they, how fast is training, which tiles are best.

    python -m bench gpu --minutes 8 --out DIR

Eight stages, each in its own processes and with a share of the minutes; what a stage does not use goes to the later ones.
Every line of DIR/results.jsonl is written as soon as it is known. A stage that fails or hangs loses only the piece of work
it was at: it is started again without that piece, as long as it has time. DIR gets four files, none above 16 MiB:
results.jsonl, log.txt, step-trace.json.gz and tests.txt. `python -m bench report DIR/results.jsonl` draws the charts, on
any machine.

Without a GPU, or with --rehearse, the stages run on the CPU with a tiny model, so that a missing package or a mistyped
option shows before the minutes count. The rehearsal also leaves data/python-texts-8192: take it along, or the GPU waits half
a minute for it.

The machine needs PyTorch 2.11, Triton 3.6, NumPy, tokenizers, safetensors, PyYAML, rich, nvidia-ml-py, cuda-core,
transformers and pytest with pytest-xdist, or newer ones, and a C compiler for Triton. pytest-timeout is used where it is.
Two more, zstandard and liger-kernel (a peer, which may be left out), come as wheels where there is no network:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 --dest wheels \\
        zstandard liger-kernel
    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=$PWD/kernels:$PWD/site python -m bench gpu --minutes 8 --out DIR

The first of these lines is for where there is a network. Nothing else needs to be installed, this package included.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .all import path_from_root, run_limited
from .record import Run, read_lines
from .stages import STAGES, WRONG

LOG_BYTES = 15 * 2**20
RESTART = 10.0  # seconds without which a stage is not started again: imports take half of them


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--only", choices=STAGES, action="append", help="this stage (may be repeated)")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU with a tiny model")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + 60 * arguments.minutes
    rehearse = arguments.rehearse or not torch.cuda.is_available()
    if rehearse and not arguments.rehearse:
        print("PyTorch sees no GPU: this is a rehearsal on the CPU, and no result", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "log.txt"
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run = Run(
        "gpu",
        arguments.out / "results.jsonl",
        torch.device("cpu" if rehearse else "cuda"),
        {"minutes": arguments.minutes},
    )
    failed = []
    wanted = [name for name in STAGES if name in (arguments.only or STAGES)]
    for index, name in enumerate(wanted):
        shares = [STAGES[later].seconds for later in wanted[index:]]
        stop = time.monotonic() + (end - time.monotonic()) * shares[0] / sum(shares)
        begun, limit = time.monotonic(), stop - time.monotonic()
        text = f"\n=== {name}: {STAGES[name].what} (at most {limit:.0f} s)"
        print(text, flush=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        statuses = run_stage(name, arguments.out, stop, rehearse)
        status: int | str = next(("stopped" if status is None else status for status in statuses if status != 0), 0)
        seconds = time.monotonic() - begun
        run.add("stage", name=name, status=status, attempts=len(statuses), seconds=seconds, limit=limit)
        if status != 0:
            what = {"stopped": "stopped", WRONG: "wrong or missing results"}.get(status, f"exit status {status}")
            failed.append(f"{name} ({what})")
        print(f"=== {name}: {seconds:.0f} s" + ("" if status == 0 else f", {failed[-1]}"), flush=True)
    print(f"\nresults: {run.path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def run_stage(name: str, out: Path, stop: float, rehearse: bool) -> list[int | None]:
    """Run a stage until `stop`, a value of time.monotonic(). While it dies at a piece of its work, run it again without.

    Returns:
        The exit status of each attempt, None for one that was killed because the time was up.
    """
    results, log = out / "results.jsonl", out / "log.txt"
    statuses: list[int | None] = []
    skip: list[str] = []
    while True:
        old_lines = len(list(read_lines(results)))
        command = [sys.executable, "-m", "bench.stages", name, "--out", path_from_root(out)]
        # Nothing new begins in the last tenth of what is left; the clock is the same in all processes.
        command += ["--end", str(stop - 0.1 * (stop - time.monotonic())), *(["--rehearse"] if rehearse else [])]
        command += [f"--skip={piece}" for piece in skip]
        status = run_limited(command, max(1.0, stop - time.monotonic()), log, max_bytes=LOG_BYTES)
        statuses.append(status)
        begun = [line["piece"] for line in list(read_lines(results))[old_lines:] if line["kind"] == "begin"]
        if status in (0, None, WRONG) or not begun or stop - time.monotonic() < RESTART:
            return statuses
        print(f"{name}: lost {begun[-1]}", flush=True)
        skip += begun
