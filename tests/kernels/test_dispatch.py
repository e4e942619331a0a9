"""Which implementation runs, without Triton too, and that kernels can be taken out of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fastroberta_kernels
import pytest
import torch
from fastroberta_kernels import _dispatch
from fastroberta_kernels._dispatch import get_capability, jit, launch, operator, record_launches, tl, use_triton
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(fastroberta_kernels.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
ON_CPU = torch.zeros(2)
ON_CUDA = SimpleNamespace(device=torch.device("cuda", 0))  # all that the decision looks at


@jit
def fill_kernel(output_ptr, value, COUNT: tl.constexpr):
    tl.store(output_ptr + tl.arange(0, COUNT), value)


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh process, whose Triton kernels are compiled unless TRITON_INTERPRET is given."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_device_decides():
    assert not use_triton("op", None, ON_CPU)
    assert not use_triton("op", "torch", ON_CPU)
    assert use_triton("op", None, ON_CUDA)
    assert use_triton("op", "triton", ON_CUDA)
    assert not use_triton("op", "torch", ON_CUDA)
    assert use_triton("op", None, ON_CUDA, None, ON_CUDA), "arguments left out are not looked at"


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match=r"^op: impl='cuda' is unknown; use None, 'triton' or 'torch'"):
        use_triton("op", "cuda", ON_CPU)


@pytest.mark.parametrize("impl", [None, "torch", "triton"])
def test_mixed_devices_are_refused(impl):
    with pytest.raises(ValueError, match=r"^op: tensor argument 2 is on cuda:0, the first is on cpu; move them"):
        use_triton("op", impl, ON_CPU, None, ON_CUDA)


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton("op", "triton", ON_CPU)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"^op: Triton kernels need CUDA tensors, these are on cpu; .*TRITON_INT"):
        use_triton("op", "triton", ON_CPU)
    with record_launches():
        assert use_triton("op", "triton", ON_CPU) and use_triton("op", None, ON_CPU)
    with pytest.raises(ValueError, match="need CUDA tensors"):
        use_triton("op", "triton", ON_CPU)


@pytest.mark.parametrize("tensor", [ON_CPU, ON_CUDA])
def test_missing_triton_is_named(monkeypatch, tensor):
    monkeypatch.setattr(_dispatch, "triton", None)
    assert not _dispatch.is_interpreting()
    assert not use_triton("op", "torch", tensor)
    with pytest.raises(ValueError, match=r"^op: the package triton is not installed; install triton"):
        use_triton("op", "triton", tensor)


def test_missing_triton_is_no_silent_fallback_on_cuda(monkeypatch):
    monkeypatch.setattr(_dispatch, "triton", None)
    with pytest.raises(ValueError, match="not installed"):
        use_triton("op", None, ON_CUDA)


def test_launch_runs_the_kernel_and_skips_empty_grids(device):
    output = torch.zeros(8, dtype=torch.int32, device=device)
    launch(fill_kernel, (0,), output, 3, COUNT=8)
    launch(fill_kernel, (4, 0), output, 3, COUNT=8)
    assert output.tolist() == [0] * 8
    launch(fill_kernel, (1,), output, 3, COUNT=8, num_warps=1)
    assert output.tolist() == [3] * 8


def test_recording_collects_launches_and_starts_none(device):
    output = torch.zeros(8, dtype=torch.int32, device=device)
    with record_launches() as launches:
        launch(fill_kernel, (1,), output, 3, COUNT=8, num_warps=2)
        launch(fill_kernel, (0,), output, 3, COUNT=8)
    assert output.tolist() == [0] * 8
    assert [(entry.kernel, entry.options) for entry in launches] == [(fill_kernel, {"COUNT": 8, "num_warps": 2})]
    assert launches[0].arguments[0] is output and launches[0].arguments[1] == 3
    with pytest.raises(KeyError), record_launches():
        raise KeyError
    launch(fill_kernel, (1,), output, 3, COUNT=8)
    assert output.tolist() == [3] * 8, "recording must end with its context, also after an exception"
    assert len(launches) == 1


def test_recording_stands_in_for_another_chip():
    assert get_capability(ON_CPU.device) == 80
    with record_launches(90):
        assert get_capability(ON_CPU.device) == 90
    assert get_capability(ON_CPU.device) == 80


@operator("test_scale")
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@scale.register_fake
def _(x, factor):
    return torch.empty_like(x)


@operator("test_scale_backward")
def scale_backward(dy: torch.Tensor, factor: float) -> torch.Tensor:
    return dy * factor


scale_backward.register_fake(lambda dy, factor: torch.empty_like(dy))


def save_factor(ctx, inputs, output):
    ctx.factor = inputs[1]


scale.register_autograd(
    lambda ctx, dy: (scale_backward(dy, ctx.factor), None) if dy is not None else (None, None),
    setup_context=save_factor,
)


class Follow(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.add(function)
        return function(*arguments, **(options or {}))


class Odd(torch.Tensor):
    pass


def list_dispatched(work):
    """Which of the two operators the profiler sees: those that went through PyTorch's dispatcher."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    return {event.name.split("::")[1] for event in profiler.events() if event.name.startswith(_dispatch.NAMESPACE)}


def test_eager_calls_of_an_operator_go_around_the_dispatcher():
    x = torch.randn(3, requires_grad=True)
    assert list_dispatched(lambda: scale(x, 2.0).sum().backward()) == set()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert list_dispatched(lambda: scale(x.detach(), 2.0)) == set()
    assert list_dispatched(lambda: scale.registered(x, 2.0)) == {"test_scale"}, (
        "this is what the profiler shows otherwise"
    )


def test_whoever_follows_the_operations_sees_an_operator():
    x = torch.randn(3, requires_grad=True)
    with Follow() as mode:
        scale(x, 2.0).sum().backward()
    ours = getattr(torch.ops, _dispatch.NAMESPACE)
    assert {ours.test_scale.default, ours.test_scale_backward.default} <= mode.seen
    assert list_dispatched(lambda: scale(x.detach().as_subclass(Odd), 2.0)) == {"test_scale"}
    with pytest.raises(RuntimeError, match="functorch"):  # which no registered operator supports
        torch.func.grad(lambda y: scale(y, 2.0).sum())(x.detach())
    x.grad = None
    torch.compile(lambda x: scale(x, 3.0), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 3.0))


def test_a_missing_second_derivative_is_an_error():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(scale(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_importing_the_kernels_imports_no_trainer_and_no_transformers():
    imports = "".join(f"import fastroberta_kernels.{module}\n" for module in MODULES)
    code = "import sys\n" + imports + "print([n for n in ('fastroberta', 'transformers') if n in sys.modules])"
    assert run_python(code) == "[]"


def test_without_triton_everything_imports_and_the_twins_work():
    imports = "".join(f"import fastroberta_kernels.{module}\n" for module in MODULES)
    code = f"""
import sys
sys.modules["triton"] = None  # an import of it now raises ImportError, as where it is not installed
import torch
{imports}
from fastroberta_kernels import attention, cross_entropy, gelu, layer_norm, masking
assert fastroberta_kernels._dispatch.triton is None

x = torch.randn(2, 8, 64, requires_grad=True)
weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
y = layer_norm.dropout_add_layer_norm(x, x, weight, bias, p=0.1, eps=1e-5, seed=1)
y = gelu.bias_gelu(y, bias)
heads = y.view(2, 8, 2, 32)
y = attention.attention(heads, heads, heads, dropout_p=0.1, seed=2).reshape(16, 64)
table = torch.randn(50, 64, requires_grad=True)
loss = cross_entropy.linear_cross_entropy(y, table, None, torch.arange(16)).loss
loss.backward()
assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, weight, bias, table))
arguments = dict(mask_token_id=49, vocab_size=50, special_token_ids=(0, 49), seed=3, sample_ids=torch.arange(2))
masked = masking.mask_tokens(torch.full((2, 20), 7), **arguments)
assert masked.positions.shape == (2, 3)
try:
    masking.mask_tokens(torch.full((2, 20), 7), **arguments, impl="triton")
except ValueError as error:
    print(error)
"""
    assert run_python(code).startswith("mask_tokens: the package triton is not installed")


def list_neighbours(module: str) -> set[str]:
    """A module and those it imports from its own package, found by following its relative imports."""
    found, to_read = set(), [module]
    while to_read:
        name = to_read.pop()
        found.add(name)
        for source, names in re.findall(
            r"^\s*from \.(\w*) import ([\w, ]+|\([^)]*\))", (PACKAGE / f"{name}.py").read_text(), re.MULTILINE
        ):
            candidates = [source] if source else re.findall(r"\w+", names)
            to_read += [candidate for candidate in candidates if candidate in MODULES and candidate not in found]
    return found


def copy_modules(modules: set[str], package: Path) -> None:
    package.mkdir()
    (package / "__init__.py").write_text("")
    for module in modules:
        (package / f"{module}.py").write_text((PACKAGE / f"{module}.py").read_text())


def test_every_module_can_be_copied_with_its_neighbours(tmp_path):
    """Into a package of another name, imported beside the original: operator names must not collide."""
    for module in MODULES:
        assert not re.search(r"^\s*(from|import) fastroberta", (PACKAGE / f"{module}.py").read_text(), re.MULTILINE)
        copy_modules(list_neighbours(module), tmp_path / f"copy_of_{module}")
    imports = "".join(f"import copy_of_{module}.{module}, fastroberta_kernels.{module}\n" for module in MODULES)
    assert run_python(imports + "print('imported')", PYTHONPATH=f"{tmp_path}{os.pathsep}{PACKAGE.parent}") == "imported"


def test_a_copied_kernel_runs_beside_the_original(tmp_path):
    assert list_neighbours("masking") == {"masking", "philox", "_dispatch"}
    assert list_neighbours("gelu") == {"gelu", "_rows", "fp8", "_dispatch"}  # as the README says
    copy_modules(list_neighbours("masking"), tmp_path / "somebody_elses")
    code = """
import torch
from fastroberta_kernels import masking as original
from somebody_elses import masking as copied
assert copied.__file__ != original.__file__ and copied.philox is not original.philox
device = "cuda" if torch.cuda.is_available() else "cpu"
ids = torch.arange(4, 44, device=device).reshape(2, 20)
arguments = dict(mask_token_id=49, vocab_size=50, special_token_ids=(0, 49), seed=3,
                 sample_ids=torch.arange(2, device=device))
results = [module.mask_tokens(ids, **arguments, impl=impl)
           for module in (original, copied) for impl in ("torch", "triton")]
for result in results[1:]:
    assert all(torch.equal(left, right) for left, right in zip(result, results[0]))
assert torch.ops.somebody_elses.mask_tokens is not torch.ops.fastroberta_kernels.mask_tokens
print(int((results[0].input_ids != ids).sum()) > 0)
"""
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    assert run_python(code, **environment) == "True"
