"""Checkpoints: a Hugging Face model directory, the optimizer's state beside it, and a manifest written last.

    <output_dir>/checkpoint-00001000/
        config.json  model.safetensors  tokenizer.json ...   what transformers loads; weights are the fp32 masters
        optimizer.safetensors                                the optimizer's moments, by parameter name
        trainer_state.json                                   step, settings, scores
        manifest.json                                        size and SHA-256 of every file above

A directory is written under a temporary name, synced, and renamed, so a checkpoint is complete or not there at all.
Nothing is pickled. Checksums catch flipped bits, which safetensors would load silently.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .corpus.shards import file_sha256
from .errors import CheckpointError

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{8,})")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=get_step)


def get_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def get_path(output_dir: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step:08d}"


def save_checkpoint(
    output_dir: Path,
    step: int,
    write_model: Callable[[Path], None],
    optimizer_tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Write one checkpoint.

    Args:
        write_model: writes the model's files into the directory it is given.
        optimizer_tensors: by name. state: everything else the run needs, as JSON types.
    Returns:
        the checkpoint's directory.
    Raises:
        CheckpointError: the disk is full or cannot be written to; earlier checkpoints are untouched.
    """
    final = get_path(output_dir, step)
    partial = output_dir / f".partial-{step:08d}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(partial)
        write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in optimizer_tensors.items()},
                      partial / OPTIMIZER)  # fmt: skip
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        # The same step again, after resuming from an earlier one.
        before = _set_aside(final) if final.exists() else None
        partial.rename(final)
        _sync(output_dir)
        if before:
            shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({error}); free some space, and the same command continues from the last "
            "checkpoint"
        ) from error
    return final


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask; safetensors itself makes files private to their owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def remove_partial_checkpoints(output_dir: Path) -> None:
    """Delete the half-written checkpoints that a killed run left behind."""
    for path in output_dir.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / STATE}: cannot be read ({error}); {_way_out(checkpoint)}") from error
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{checkpoint / STATE}: has no settings under config; {_way_out(checkpoint)}")
    return state


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with its checksum in the manifest.

    Raises:
        CheckpointError: a file is missing, or its size or checksum differs.
    """
    path = checkpoint / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_way_out(checkpoint)}") from error
    if not isinstance(files, dict):  # prepared data has a file of this name too
        raise CheckpointError(f"{path}: not part of a checkpoint; give the directory of one")
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {_way_out(checkpoint)}")
        if _describe(file) != expected:
            raise CheckpointError(f"{file}: differs from its checksum in {MANIFEST}; {_way_out(checkpoint)}")


def verify_directory(directory: Path) -> None:
    """`verify_checkpoint` for a checkpoint of this trainer; other Hugging Face directories have no manifest.

    Raises:
        CheckpointError: also for the directory of a run, which only contains checkpoints.
    """
    if inside := list_checkpoints(directory):
        raise CheckpointError(f"{directory}: the directory of a run, not a checkpoint; give {inside[-1]}")
    if (directory / MANIFEST).exists():
        verify_checkpoint(directory)


def load_optimizer_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors given to `save_checkpoint`, on the CPU; verify the checkpoint first."""
    return load_file(checkpoint / OPTIMIZER)


def remove_old_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all checkpoints except the newest `keep` and the one with the lowest `eval_loss`.

    A checkpoint whose state cannot be read stays where it is: it must not stop the run.
    """
    checkpoints = list_checkpoints(output_dir)
    losses: dict[Path, Any] = {}
    for path in checkpoints:
        with contextlib.suppress(CheckpointError):
            losses[path] = read_state(path).get("eval_loss")
    # Not NaN, which is the least of all if it comes first.
    scores = {path: loss for path, loss in losses.items() if isinstance(loss, int | float) and math.isfinite(loss)}
    best = min(scores, key=scores.__getitem__) if scores else None
    for path in checkpoints[:-keep]:
        if path in losses and path != best:
            shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint before it is deleted: one that is half deleted must not look complete. Returns its new path."""
    return checkpoint.rename(checkpoint.with_name(f".partial-{checkpoint.name}"))


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _way_out(checkpoint: Path) -> str:
    return f"move {checkpoint.name} away to continue from the previous checkpoint"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
