"""One operation at one size: inputs, an exact result, its cost, and the implementations to compare.

Each operation has a file with the settings to measure and a function that makes a `Case` of a setting. An implementation is
compared with the exact result in fp64 before it is timed; a wrong one is reported as wrong and not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .measure import Marks, package_version

OURS, EAGER, COMPILED = "fastroberta", "PyTorch eager", "torch.compile"
ERROR_FACTOR = 4.0  # largest error, relative to that of PyTorch's own operations in the same dtype
DROPOUT_TOLERANCE = 0.1  # relative deviation of the noise that dropout adds


class Size(NamedTuple):
    """Widths of a RoBERTa."""

    hidden: int
    heads: int
    intermediate: int
    layers: int


SIZES = {"base": Size(768, 12, 3072, 12), "large": Size(1024, 16, 4096, 24), "tiny": Size(128, 2, 512, 2)}
MODELS = ("base", "large")  # what is measured; "tiny" is for rehearsals
HEAD_SIZE = 64
LENGTH = 512
# Rows and columns of small calls, whose time on a CPU goes into Python and PyTorch's dispatch rather than arithmetic.
SMALL = {"8x64": (8, 64), "64x128": (64, 128), "256x256": (256, 256)}
VOCABULARY, VOCABULARY_ROWS = 50265, 50304


class Setting(NamedTuple):
    """A model size, a dropout probability and a layout of sequences."""

    model: str  # a key of SIZES or SMALL
    dropout: float = 0.0
    layout: str = "full"  # full: every sequence is full; padded: they end early; packed: documents inside sequences

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.model}{'' if self.layout == 'full' else ', ' + self.layout}{dropout}"


class Work(NamedTuple):
    """The least work: floating-point operations, and bytes read and written in the device's memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, ceilings: dict[str, float]) -> float:
        """The least time in seconds on a machine with these rates."""
        return max(self.flops / ceilings["matmul_flops_per_second"], self.bytes / ceilings["copy_bytes_per_second"])


class Absent(Exception):
    """An implementation cannot run here. The message says why."""


class Verdict(NamedTuple):
    """Errors of an implementation, and what is wrong with it, if anything."""

    error: dict[str, float]
    fault: str | None = None


# Given the dropout probability, an implementation is a function of the case's inputs, with one output or several.
Build = Callable[[float], Callable[..., Any]]


@dataclass
class Case:
    """One operation in one setting.

    Attributes:
        inputs: arguments of every implementation, with gradients for those that require them.
        upstream: gradient of the output, or of each output; None for an operation without a backward.
        exact: the same function in plain PyTorch, called with fp64 inputs and no dropout.
        twin: our operation in plain PyTorch. In fp64 it drops the same elements as our kernel: with dropout, output
            and gradients of our kernel are compared with it.
        forward, backward: the work of each.
        verify: checks an implementation whose outputs and gradients cannot be compared one by one.
    """

    operation: str
    setting: Setting
    shape: str
    dtype: torch.dtype
    inputs: tuple[Any, ...]
    implementations: dict[str, Build]
    forward: Work
    upstream: Tensor | tuple[Tensor, ...] | None = None
    backward: Work = Work(0, 0)
    exact: Callable[..., Tensor] | None = None
    verify: Callable[[str, Callable[..., Tensor]], Verdict] | None = None
    twin: Build | None = None
    _exact_results: dict[bool, list[Tensor]] = field(default_factory=dict)
    _bounds: dict[str, float] = field(default_factory=dict)
    _noise: float | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [value for value in self.inputs if isinstance(value, Tensor) and value.requires_grad]

    def run(self, function: Callable[..., Tensor]) -> Marks:
        """Forward, and backward where there is one, with a mark after each."""
        device = next(value.device for value in self.inputs if isinstance(value, Tensor))
        marks = Marks(device)
        output = function(*self.inputs)
        marks.mark()
        if self.upstream is not None:
            torch.autograd.grad(output, self.leaves, self.upstream)
            marks.mark()
        return marks

    def check(self, name: str) -> Verdict:
        """Compare an implementation with the exact result.

        Raises:
            Absent: it cannot run here. Anything the implementation raises.
        """
        build = self.implementations[name]
        if self.verify is not None:
            return self.verify(name, build(self.setting.dropout))
        shares_mask = name == OURS and self.twin is not None and self.setting.dropout > 0
        results = self._results(build(self.setting.dropout if shares_mask else 0.0))
        exact = self._find_exact(shares_mask)
        count = len(self.upstream) if isinstance(self.upstream, tuple) else 1
        named = zip(["output"] * count + ["gradient"] * (len(exact) - count), results, exact)
        error = {"output": 0.0} | ({"gradient": 0.0} if len(exact) > count else {})
        for kind, value, expected in named:
            error[kind] = max(error[kind], relative_error(value, expected))
        if not all(math.isfinite(value) for value in error.values()):
            return Verdict(error, "not finite")
        if name == EAGER:
            unit = torch.finfo(self.dtype).eps
            self._bounds = {kind: ERROR_FACTOR * value + unit for kind, value in error.items()}
        for kind, bound in self._bounds.items():
            if error[kind] > bound:
                return Verdict(error, f"error of the {kind} {error[kind]:.1e}, at most {bound:.1e} is to be expected")
        if self.setting.dropout and not shares_mask:
            # Which elements are dropped is each implementation's own choice; how strong the noise is, is not.
            strength = relative_error(build(self.setting.dropout)(*self.inputs).detach(), exact[0])
            error["noise"] = strength
            if name == EAGER:
                self._noise = strength
            if self._noise is not None and abs(strength / self._noise - 1) > DROPOUT_TOLERANCE:
                return Verdict(error, f"dropout changes the output by {strength:.3f}, {self._noise:.3f} expected")
        return Verdict(error)

    def _results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        output = function(*self.inputs)
        gradients = torch.autograd.grad(output, self.leaves, self.upstream) if self.upstream is not None else ()
        return [value.detach() for value in (*as_tuple(output), *gradients)]

    def _find_exact(self, shares_mask: bool) -> list[Tensor]:
        """Of our twin with dropout, or of the exact function without; each is computed once."""
        if shares_mask not in self._exact_results:
            function = self.twin(self.setting.dropout) if shares_mask else self.exact
            self._exact_results[shares_mask] = self._compute_exactly(function)
        return self._exact_results[shares_mask]

    def _compute_exactly(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """Output and gradients in fp64, kept in fp32: its rounding is far below what is measured."""
        wide = tuple(
            value.detach().double().requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for value in self.inputs
        )
        output = function(*wide)
        leaves = [value for value in wide if isinstance(value, Tensor) and value.requires_grad]
        upstream = None if self.upstream is None else [value.double() for value in as_tuple(self.upstream)]
        gradients = torch.autograd.grad(as_tuple(output), leaves, upstream) if upstream is not None else ()
        return [value.detach().float() for value in (*as_tuple(output), *gradients)]


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, anything else as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Root of the mean square of the difference, relative to that of `exact`."""
    exact = exact.float()
    difference = value.float().sub_(exact) if value.dtype != torch.float32 else value - exact
    norm = torch.linalg.vector_norm(exact, dtype=torch.float64)
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64) / norm)


def need_package(name: str, *, gpu: bool, device: torch.device) -> None:
    """Raise Absent unless a package is installed and, if it needs a GPU, there is one."""
    version = package_version(name)
    if version is None:
        raise Absent("not installed")
    if gpu and device.type != "cuda":
        raise Absent(f"installed ({version}), needs a GPU")


def compile_function(build: Build) -> Build:
    """The implementation under torch.compile with static shapes."""

    def compiled(dropout: float) -> Callable[..., Tensor]:
        return torch.compile(build(dropout), dynamic=False)

    return compiled


def make_random(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0
) -> Tensor:
    """A leaf of normal numbers that asks for a gradient; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).mul_(scale)
    return values.to(device=device, dtype=dtype).requires_grad_()


def find_size(setting: Setting) -> Size:
    """The widths of a setting."""
    if setting.model in SMALL:
        columns = SMALL[setting.model][1]
        return Size(columns, columns // HEAD_SIZE, columns, 1)
    return SIZES[setting.model]


def find_layout(setting: Setting, device: torch.device) -> tuple[int, int]:
    """Sequences of a setting and their length."""
    return (1, SMALL[setting.model][0]) if setting.model in SMALL else (count_sequences(device), LENGTH)


def count_sequences(device: torch.device) -> int:
    """Sequences of LENGTH tokens in a case: a GPU's usual micro-batch, or little enough for a CPU."""
    return 64 if device.type == "cuda" else 2
