"""A GPU machine's first ten minutes: are the kernels right, how fast are they, how fast is training.

Runs the tests that need a GPU, then `all`, in under nine minutes. Every piece has a time limit of its own and fails by
itself; the exit status says whether all went well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .all import ROOT, run_limited
from .results import Run, default_path

TESTS_LIMIT = 150  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--data", help="directory written by fastroberta.prepare; without: the texts inside Python")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add to")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m bench gpu: PyTorch sees no GPU; `python -m bench all` runs on a CPU", file=sys.stderr)
        return 2
    out = arguments.out or default_path(torch.device("cuda"))
    tests = run_tests(out)
    command = [sys.executable, "-m", "bench", "all", "--quick", "--out", str(out)]
    benchmarks = subprocess.run(command + (["--data", arguments.data] if arguments.data else []), cwd=ROOT).returncode
    return int(bool(tests != 0 or benchmarks))


def run_tests(out: Path) -> int | None:
    """`pytest -m gpu`, and a line with its outcome; all of its output goes to a file beside the results."""
    run = Run("gpu tests", out, torch.device("cuda"), {})
    log = out.with_suffix(".tests.txt")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", "tests"]
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
