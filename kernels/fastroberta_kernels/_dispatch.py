"""Choice of implementation, how operators reach PyTorch, and the one place where Triton kernels are launched.

Each operation has two implementations, a Triton kernel and one in PyTorch operations. `impl=None` picks Triton for CUDA
tensors and PyTorch for all others. `impl="triton"` and `impl="torch"` are honoured or refused, never replaced silently.

Triton is optional. Without it `jit` returns the function unchanged, nothing launches it, and PyTorch does all the work.
With `TRITON_INTERPRET=1` in the environment before the first import, Triton kernels run on CPU tensors in Triton's
interpreter; that is how the tests compare both implementations on machines without a GPU.

Operators (`operator`) are registered with torch.library, because torch.compile, torch.export and torch.func need a name
and a schema for what they cannot look into. A registered operator goes through PyTorch's dispatcher and several layers of
Python, which costs the host more than everything else in a training step of small batches. Plain eager calls therefore go
straight to the function.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # a platform without Triton
    triton = None
    tl = None

    def jit(function=None, **options):
        return function or jit


# Names in torch.library are global to a process. They are derived from the package, so that a copy of these files in
# another package can be imported beside the original.
NAMESPACE = (__package__ or "fastroberta_kernels").replace(".", "_")
PLAIN = (torch.Tensor, torch.nn.Parameter)


class Launch(NamedTuple):
    """A kernel launch as a wrapper made it, collected by `record_launches` for ahead-of-time compilation."""

    kernel: Any
    arguments: tuple
    options: dict[str, Any]


_record: Callable[[Launch], None] | None = None
_recorded_capability = 80


def is_interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def is_transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp and their like) is running."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def use_triton(operation: str, impl: str | None, *tensors: torch.Tensor | None) -> bool:
    """Whether `operation` uses Triton for `tensors`. The first tensor determines the device; others may be None.

    Raises:
        ValueError: unknown `impl`, tensors on different devices, or Triton requested where it cannot run.
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
    if impl == "torch" or (impl is None and device.type != "cuda" and _record is None):
        return False
    if is_transforming():
        raise ValueError(f"{operation}: torch.func cannot transform the Triton kernel; pass impl='torch'")
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


def is_autocasting(device_type: str) -> bool:
    """Whether autocast is enabled. Meta tensors, which stand in for others, have none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as an operation made of matrix products takes them: in the dtype of autocast where it is enabled.

    As in PyTorch's own autocast, fp64 stays as it is.
    """
    device_type = tensors[0].device.type
    if not is_autocasting(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def without_autocast(function: Callable) -> Callable:
    """The body of an operator with autocast disabled, which would cast its products also when a backward runs in it."""

    @functools.wraps(function)
    def run(first, *arguments):
        if not is_autocasting(first.device.type):
            return function(first, *arguments)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments)

    return run


class Operator:
    """A function of tensors that PyTorch's compilers see as one node, and that eager code calls directly.

    Attributes:
        registered: the operator as torch.library knows it.
    """

    def __init__(self, name: str, function: Callable):
        self.registered = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
        self._function = function
        self._differentiable: type[torch.autograd.Function] | None = None

    def register_fake(self, function: Callable) -> Callable:
        """As `register_fake` of torch.library: the shapes of the results. Returns the function."""
        self.registered.register_fake(function)
        return function

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As `register_autograd` of torch.library."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._differentiable = type(function.__name__, (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or is_traced():
            return self.registered(*arguments)
        needs_gradient = False
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if type(argument) not in PLAIN:
                    return self.registered(*arguments)
                needs_gradient |= argument.requires_grad
        if not (needs_gradient and torch.is_grad_enabled()):
            return self._function(*arguments)
        if self._differentiable is None:  # PyTorch says what is missing, should anyone differentiate the result
            return self.registered(*arguments)
        return self._differentiable.apply(*arguments)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorator: makes an `Operator` of a function that changes none of its arguments and returns new tensors.

    Its parameters and result need the annotations of torch.library.custom_op.
    """
    return lambda function: Operator(name, function)


def is_traced() -> bool:
    """Whether something other than torch.compile follows the operations: torch.func, a dispatch mode, torch.jit.trace."""
    return (
        is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def align(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor if it is contiguous and starts at a multiple of 16 bytes, else a copy that is.

    For other pointers, such as views into a larger tensor, Triton would compile one more kernel for each combination of
    arguments, slower and with more registers. A copy is cheaper.
    """
    if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a Triton kernel on its tensors' device. `options` are its constexprs, `num_warps`, `num_stages`, `maxnreg`.

    An empty grid is skipped, so wrappers need no special case for empty tensors.
    """
    if 0 in grid:
        return
    if _record is not None:
        _record(Launch(kernel, arguments, options))
        return
    first = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def get_capability(device: torch.device) -> int:
    """Ten times the compute capability of a CUDA device. Elsewhere it is the one given to `record_launches`, or 80."""
    return _read_capability(device) if device.type == "cuda" else _recorded_capability


@functools.cache
def _read_capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextlib.contextmanager
def record_launches(capability: int = 80) -> Iterator[list[Launch]]:
    """Inside the context, launches are collected instead of started, and all tensors count as a GPU's. Outputs stay
    unwritten.

    Every configuration can thus be compiled ahead of time with the very arguments that the wrappers pass. They choose
    what a chip of `capability` (ten times the compute capability) would get.
    """
    global _record, _recorded_capability
    launches: list[Launch] = []
    outer = _record, _recorded_capability
    _record, _recorded_capability = launches.append, capability
    try:
        yield launches
    finally:
        _record, _recorded_capability = outer
