"""The part of each parameter that a process updates, and the optimizer's state as a checkpoint holds it.

A checkpoint does not depend on the sharding: it holds whole tensors, named `<kind>.<parameter>`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """What this process updates of one parameter: elements [start, stop) of the flattened tensor."""

    parameter: (
        nn.Parameter
    )  # fp32 (stop - start,), or the whole parameter in its own shape; the update rule sees this one
    start: int
    stop: int
    shape: torch.Size  # of the whole parameter


def save_state(
    inner: Any, pieces: Mapping[str, Piece], gather: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`step`, `exp_avg` and `exp_avg_sq` of every parameter.

    Args:
        inner: the update rule. gather: turns this process's pieces into whole tensors; all processes call it together.
    """
    states = {name: inner.state[piece.parameter] for name, piece in pieces.items()}
    found = {f"step.{name}": torch.as_tensor(state["step"]) for name, state in states.items()}
    for kind in MOMENTS:
        whole = gather({name: state[kind] for name, state in states.items()})
        found |= {f"{kind}.{name}": tensor for name, tensor in whole.items()}
    return found


@torch.no_grad()
def load_state(inner: Any, pieces: Mapping[str, Piece], tensors: Mapping[str, Tensor], where: str) -> None:
    """The inverse of `save_state`: each process takes its pieces out of whole tensors.

    Raises:
        CheckpointError: the state of a parameter is missing or has the wrong shape; `where` names the checkpoint.
    """
    for name, piece in pieces.items():
        state = inner.state[piece.parameter]
        for kind in ("step", *MOMENTS):
            saved = tensors.get(f"{kind}.{name}")
            if saved is None or saved.shape != (() if kind == "step" else piece.shape):
                raise CheckpointError(
                    f"{where}: optimizer state {kind}.{name} is missing or has the wrong shape; resume from another "
                    "checkpoint"
                )
            if kind != "step":
                saved = saved.flatten()[piece.start : piece.stop].view(piece.parameter.shape)
            if kind in state:  # FusedLAMB's state consists of views of its buffers
                state[kind].copy_(saved)
            else:
                state[kind] = saved.to(piece.parameter.device, copy=True)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that must have one."""
    assert parameter.grad is not None
    return parameter.grad
