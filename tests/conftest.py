"""Settings that must stand before the first import of the kernels."""

import os
import signal

import torch

# Without a GPU every Triton kernel runs in Triton's interpreter; the variable is read when triton.jit decorates.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

# Whoever started the tests in the background had SIGINT ignored, in all programs that the tests start and interrupt too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def mend_interpreter() -> None:
    """What Triton 3.6's interpreter gets wrong, and what would hide or invent errors of the kernels: products of bf16 are
    taken for products of integers, rounding to bf16 and to 8 bits cuts digits off, and numpy >= 2.4 refuses tensors as
    loop bounds.

    Products are summed in fp64 and rounded to fp32 once: in fp32 the error would be that of numpy's BLAS, whose order of
    summation is another on each processor, and tests at the edge of their bound would pass on one and fail on the next.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_tensor = interpreter._patch_lang_tensor
    convert = interpreter._convert_float
    eights = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def patch_tensor_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def multiply(self, a, b, d, input_precision, max_num_imprecise_acc):
        def widen(handle):
            data = handle.data
            if handle.dtype.scalar == tl.bfloat16:
                data = (data.astype(np.uint32) << 16).view(np.float32)
            return data.astype(np.float64)

        product = (widen(a) @ widen(b)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def convert_to_nearest(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if source == tl.float32 and target in eights:
            return torch.from_numpy(np.ascontiguousarray(data)).to(eights[target]).view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter.InterpreterBuilder.create_dot = multiply
    interpreter._convert_float = convert_to_nearest


if os.environ.get("TRITON_INTERPRET") == "1":
    mend_interpreter()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(trylast=True)  # once the report is sent
def pytest_runtest_logreport(report):
    """After an illegal memory access a process cannot use its GPU any more, and all its later tests would fail as well. One
    of several processes ends itself then, and xdist starts another."""
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run in this session: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """What `time.monotonic` says, set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock
