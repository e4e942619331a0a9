"""Which implementation runs, and the one door through which every Triton kernel is started.

Each operation has two implementations: a Triton kernel and a plain PyTorch twin. `impl=None` takes Triton for CUDA
tensors and PyTorch elsewhere; `impl="triton"` and `impl="torch"` are obeyed or refused, never replaced silently.

Triton is optional: without it `jit` leaves a function as it is (nothing launches it) and the twins do all the work.
With `TRITON_INTERPRET=1` in the environment before the first import, Triton kernels run on CPU tensors in Triton's
interpreter, which is how the tests hold kernel and twin together on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # a platform without Triton: the twins are the implementation
    triton = None
    tl = None

    def jit(function=None, **options):
        return function or jit


# torch.library names are global to a process. Taking them from the package lets a copy of these files in another
# package be imported beside the original.
NAMESPACE = (__package__ or "fastroberta_kernels").replace(".", "_")


class Launch(NamedTuple):
    """One kernel launch as the wrappers made it, kept by `record_launches` for compilation ahead of time."""

    kernel: Any
    arguments: tuple
    options: dict[str, Any]


_record: Callable[[Launch], None] | None = None


def is_interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(operation: str, impl: str | None, *tensors: torch.Tensor | None) -> bool:
    """Decide which implementation of `operation` runs on `tensors`, the first of which names the device.

    Raises:
        ValueError: `impl` is unknown, the tensors lie on different devices, or Triton is asked for where it cannot run.
    """
    device = tensors[0].device
    for index, tensor in enumerate(tensors):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{operation}: tensor argument {index} is on {tensor.device}, the first is on {device}; "
                "move them to one device"
            )
    if impl not in (None, "triton", "torch"):
        raise ValueError(f"{operation}: impl={impl!r} is unknown; use None, 'triton' or 'torch'")
    if impl == "torch" or (impl is None and device.type != "cuda"):
        return False
    if triton is None:
        raise ValueError(
            f"{operation}: the package triton is not installed; install triton>=3.6 (Linux), or pass impl='torch'"
        )
    if device.type != "cuda" and not is_interpreting() and _record is None:
        raise ValueError(
            f"{operation}: Triton kernels need CUDA tensors, these are on {device}; move them to a CUDA device, pass "
            "impl='torch', or set TRITON_INTERPRET=1 before the first import to run them in Triton's interpreter"
        )
    return True


def align(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, contiguous and on a 16-byte border; a copy where it is not.

    Triton compiles another kernel for a pointer that lies elsewhere (a view into a larger tensor can): a slow one, with
    more registers, for each combination of such arguments. None of those is ever launched.
    """
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a Triton kernel. `options` are its constexpr parameters, `num_warps` and `num_stages`.

    Triton launches on the current CUDA device, which need not be the one the tensors lie on: this sets it.
    An empty grid is skipped, so that empty tensors need no special case in the wrappers.
    """
    if 0 in grid:
        return
    if _record is not None:
        _record(Launch(kernel, arguments, options))
        return
    first = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside the context, launches are collected instead of started; outputs stay unwritten.

    This is how every configuration is compiled ahead of time with the argument types that the wrappers really pass.
    """
    global _record
    launches: list[Launch] = []
    outer, _record = _record, launches.append
    try:
        yield launches
    finally:
        _record = outer
