"""Every benchmark, one after another, each in processes of its own with a time limit.

One that fails or takes too long does not stop the others. Results are written line by line, so what was measured is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from .record import Run, default_path

ROOT = Path(__file__).parents[1]
# Seconds that each benchmark may take, and where it shall be quick. On a GPU `python -m bench gpu` does all of it.
LIMITS = {"kernels": 1200, "train": 2400, "prepare": 900, "resources": 600}
QUICK_LIMITS = {"kernels": 150, "train": 470, "prepare": 60, "resources": 0}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under ten minutes on two CPU cores")
    parser.add_argument("--only", choices=LIMITS, action="append", help="this benchmark (may be repeated)")
    parser.add_argument("--data", help="directory written by fastroberta.prepare; without: the texts inside Python")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add to")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = arguments.out or default_path(device)
    begun = time.monotonic()
    failed = []
    for name, limit in (QUICK_LIMITS if arguments.quick else LIMITS).items():
        if name not in (arguments.only or [name]) or not (limit or arguments.only):
            continue
        options = ["--out", path_from_root(out), "--seconds", str(0.85 * limit)] + ["--quick"] * arguments.quick
        if name == "train" and arguments.data:
            options += ["--data", arguments.data]
        if name == "prepare":
            options = ["--megabytes", "2", "--repeats", "2"] if arguments.quick else ["--megabytes", "50"]
            status = run_prepare(options, limit, out, device)
        else:
            status = run_benchmark([name, *(options if name != "resources" else [])], limit)
        if status:
            failed.append(f"{name} ({status})")
    if status := run_benchmark(["report", path_from_root(out)], 120):
        failed.append(f"report ({status})")
    print(f"{time.monotonic() - begun:.0f} s; results: {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def path_from_root(path: Path) -> str:
    """A path relative to this repository's folder, where the benchmarks run and which their recorded command is for."""
    return os.path.relpath(path.resolve(), ROOT)


def run_benchmark(arguments: Sequence[str], limit: float) -> str:
    """Run `python -m bench ...`; returns why it failed, or nothing."""
    print(f"\n=== {' '.join(arguments)}", flush=True)
    status = run_limited([sys.executable, "-m", "bench", *arguments], limit)
    return "" if status == 0 else f"stopped after {limit:.0f} s" if status is None else f"exit status {status}"


def run_limited(
    command: Sequence[str],
    limit: float,
    log: Path | None = None,
    *,
    max_bytes: int = sys.maxsize,
    own_group: bool = True,
) -> int | None:
    """Run a command in this repository; after `limit` seconds (0: never) kill it and all of its processes.

    Args:
        log: file to which its output is added, of which it then has `max_bytes` at most; all of it is printed as well.
        own_group: False where this process is itself run under a limit, which ends its group.
    Returns:
        Its exit status, or None if it was killed.
    """
    output = None if log is None else subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=output, stderr=None if log is None else subprocess.STDOUT, start_new_session=own_group
    )
    copier = threading.Thread(target=copy_output, args=(process.stdout, log, max_bytes), daemon=True)
    if log is not None:
        copier.start()
    try:
        return process.wait(limit or None)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Its worker processes too, and also when this program is interrupted.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if own_group else process.kill()
        process.wait()
        if log is not None:
            copier.join(5)


def copy_output(output: IO[bytes], log: Path, max_bytes: int) -> None:
    """Print what a process says, line by line as it comes, and add it to a file until that is full."""
    with open(log, "ab", buffering=0) as file:
        for line in output:
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()
            if file.tell() + len(line) <= max_bytes:
                file.write(line)


def run_prepare(options: Sequence[str], limit: float, out: Path, device: torch.device) -> str:
    """The preparation benchmark, its line given the run that the others have."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "prepare.jsonl")
        if reason := run_benchmark(["prepare", *options, "--output", str(lines)], limit):
            return reason
        result = json.loads(lines.read_text().splitlines()[-1])
        Run("prepare", out, device, {"options": list(options)}).add("prepare", **result)
    return ""
