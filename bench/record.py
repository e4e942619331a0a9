"""A results file of JSON lines: a line that says what ran where, then one for each measurement of that run."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .measure import describe_machine

DIRECTORY = Path(__file__).parent / "results"


def default_path(device: torch.device) -> Path:
    """bench/results/<gpu-or-cpu>-<date>.jsonl."""
    name = "cpu"
    if device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return DIRECTORY / f"{name}-{time.strftime('%Y-%m-%d')}.jsonl"


class Run:
    """One run of one benchmark. Each line is written as soon as it is known, so an interrupted run loses nothing.

    Args:
        kind: "kernels", "train", ... path: file to append to.
        settings: options of the run.
    """

    def __init__(self, kind: str, path: Path, device: torch.device, settings: dict[str, Any]):
        self.path, self.id = path, uuid.uuid4().hex[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.machine = describe_machine(device)
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.add("run", of=kind, time=moment, settings=settings, **self.machine)

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Append a line; returns it."""
        line = {"kind": kind, "run": self.id, **values}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        return line


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a results file."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
