"""`config.yaml` in the directory of a run: every setting as resolved, and in comments each start of the run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

from ..cli.arguments import to_dict
from ..config import TrainConfig
from ..errors import CheckpointError

HEADER = "# Every setting of this run, written by fastroberta when it starts. --config reads it back."
ROOT = Path(__file__).parents[2]


def write_run_settings(config: TrainConfig, step: int) -> None:
    """Write `config.yaml` in `output_dir`, which must exist. Comments of earlier starts stay; this start is added.

    A file of that name which was not written here, such as the one given to --config, becomes config-given.yaml.

    Args:
        step: after which the run begins or continues.
    Raises:
        CheckpointError: the disk is full or not writable.
    """
    path = Path(config.output_dir) / "config.yaml"
    partial = path.with_name("config.yaml.partial")
    starts: list[str] = []
    try:
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            if lines[:1] == [HEADER]:
                starts = [line for line in lines[1:] if line.startswith("#")]
            else:
                path.replace(path.with_name("config-given.yaml"))
        text = "\n".join([HEADER, *starts, *_describe_start(step), yaml.safe_dump(to_dict(config), sort_keys=False)])
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); free some space, and start again") from error


def _describe_start(step: int) -> list[str]:
    """Comment lines: when and on what the run starts, and the command."""
    versions = [f"python {platform.python_version()}"]
    for package in ("fastroberta", "torch", "triton", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of the module after python -m
    command = ["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]]
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    commit = _find_commit()
    return [
        f"# {when}, after step {step}, on {platform.node()}: {', '.join(versions)}"
        + (f", commit {commit}" if commit else ""),
        *(f"#   {line}" for line in shlex.join(command).splitlines()),
    ]


def _find_commit() -> str:
    """Of the source tree that runs, with -dirty if files were changed; empty where there is none."""
    if not (ROOT / ".git").exists():  # installed: a repository around it would be the user's
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
