"""Settings that must stand before the first import of the kernels."""

import os

import torch

# Without a GPU every Triton kernel runs in Triton's interpreter; the variable is read when triton.jit decorates.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest


def mend_interpreter() -> None:
    """Two faults of Triton's interpreter that would hide or invent errors: it rounds fp32 to bf16 by cutting digits off,
    and with numpy >= 2.4 a loop bound that is not a constant raises a TypeError."""
    try:
        import triton.language as tl
        import triton.runtime.interpreter as interpreter
    except ImportError:
        return
    patch_tensor, cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def cast_to_nearest(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            nearest = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(nearest.view(torch.int16).numpy().view(np.uint16), dtype.scalar)
        return cast(self, source, dtype)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.cast_impl = cast_to_nearest


if os.environ.get("TRITON_INTERPRET") == "1":
    mend_interpreter()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run in this session: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
