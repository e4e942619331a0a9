"""A GPU's first minutes: are the kernels right, how fast are they, how fast is training, which tiles are best.

    python -m bench gpu --minutes 8 --out DIR

Eight stages, each in its own processes and with a share of the minutes; what a stage does not use goes to the later ones. A
stage that fails or hangs loses only itself, because every line of DIR/results.jsonl is written as soon as it is known. DIR
gets four files, none above 16 MiB: results.jsonl, log.txt, step-trace.json.gz and tests.txt. `python -m bench report
DIR/results.jsonl` draws the charts, on any machine.

Without a GPU, or with --rehearse, the stages run on the CPU with a tiny model, so that a missing package or a mistyped
option shows before the minutes count. The rehearsal also leaves data/python-texts-8192, which spares the GPU half a minute.

A machine without network needs the missing packages as wheels:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 --dest wheels \\
        jsonargparse zstandard liger-kernel
    pip install --no-index --no-deps --find-links wheels --target site jsonargparse zstandard liger-kernel
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
from .record import Run
from .stages import STAGES

LOG_BYTES = 15 * 2**20


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
    results, log = arguments.out / "results.jsonl", arguments.out / "log.txt"
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run = Run("gpu", results, torch.device("cpu" if rehearse else "cuda"), {"minutes": arguments.minutes})
    failed = []
    wanted = [name for name in STAGES if name in (arguments.only or STAGES)]
    for index, name in enumerate(wanted):
        shares = [STAGES[later].seconds for later in wanted[index:]]
        limit = (end - time.monotonic()) * shares[0] / sum(shares)
        command = [sys.executable, "-m", "bench.stages", name, "--out", path_from_root(arguments.out)]
        # Nothing new begins in the last tenth of the limit; the clock is the same in all processes.
        command += ["--end", str(time.monotonic() + 0.9 * limit), *(["--rehearse"] if rehearse else [])]
        begun, text = time.monotonic(), f"\n=== {name}: {STAGES[name].what} (at most {limit:.0f} s)"
        print(text, flush=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        status = run_limited(command, limit, log, max_bytes=LOG_BYTES)
        seconds = time.monotonic() - begun
        run.add("stage", name=name, status="stopped" if status is None else status, seconds=seconds, limit=limit)
        if status != 0:
            failed.append(f"{name} ({'stopped' if status is None else f'exit status {status}'})")
        print(f"=== {name}: {seconds:.0f} s" + ("" if status == 0 else f", {failed[-1]}"), flush=True)
    print(f"\nresults: {results}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))
