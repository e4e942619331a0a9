"""A GPU machine's first twenty minutes: are the kernels right, how fast are they, how fast is training.

Runs the tests that need a GPU, then `all --quick`, each in less than ten minutes; `--only` takes one of them. Every piece
has a time limit of its own and fails by itself; the exit status says whether all went well.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .all import ROOT, path_from_root, run_limited
from .record import Run, default_path

# Most of the tests compile some kernels first, a second each on one core, so several processes share the GPU. Those with
# more than 2**31 elements need up to 60 GB and go to one of them, one by one.
TESTS_LIMIT = 570  # seconds
TEST_PROCESSES = 8
PARTS = ("tests", "benchmarks")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="this part")
    parser.add_argument("--data", help="directory written by fastroberta.prepare; without: the texts inside Python")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add to")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m bench gpu: PyTorch sees no GPU; `python -m bench all` runs on a CPU", file=sys.stderr)
        return 2
    out = arguments.out or default_path(torch.device("cuda"))
    wanted = [arguments.only] if arguments.only else PARTS
    failed = "tests" in wanted and run_tests(out) != 0
    if "benchmarks" in wanted:
        command = [sys.executable, "-m", "bench", "all", "--quick", "--out", path_from_root(out)]
        command += ["--data", path_from_root(Path(arguments.data))] if arguments.data else []
        failed |= subprocess.run(command, cwd=ROOT).returncode != 0
    return int(failed)


def run_tests(out: Path) -> int | None:
    """`pytest -m gpu`, and a line with its outcome; all of its output goes to a file beside the results."""
    run = Run("gpu tests", out, torch.device("cuda"), {})
    log = out.with_suffix(".tests.txt")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", "tests"]
    command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1)), "--dist", "loadgroup"]
    begun = time.monotonic()
    with open(log, "w") as file:
        status = run_limited(command, TESTS_LIMIT, file)
    lines = log.read_text(errors="replace").splitlines()
    summary = next((line for line in reversed(lines) if " passed" in line or " failed" in line or " error" in line), "")
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    run.add("tests", status=status, seconds=time.monotonic() - begun, summary=summary, failures=failures)
    how = f"stopped after {TESTS_LIMIT} s" if status is None else f"exit status {status}"
    print(f"gpu tests: {how}; {summary}", *failures, f"output: {log}", sep="\n  ", flush=True)
    return status
