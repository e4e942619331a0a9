"""The smallest set of launches that takes every branch of every kernel, for `bench.resources` to compile."""

from collections.abc import Callable, Iterator

import torch
from fastroberta_kernels._dispatch import Launch, launch, record_launches

import bench.launch_cases
from bench.resources import KERNEL_MODULES

CHIP = 90  # H100


def list_branches(recorded: Launch) -> set[tuple]:
    """What decides which code is compiled: each flag, and whether each tensor is there at all."""
    arguments = zip(recorded.kernel.arg_names, recorded.arguments)
    tensors = {(name, value is None) for name, value in arguments if value is None or isinstance(value, torch.Tensor)}
    return tensors | {item for item in recorded.options.items() if isinstance(item[1], bool)}


def launch_cases() -> Iterator[Callable[[], None]]:
    """Of the launches of all kernel modules, those that take a branch which no earlier one has taken."""
    with record_launches(CHIP) as launches:
        for name in KERNEL_MODULES:
            for case in getattr(bench.launch_cases, f"{name}_cases")():
                case()
    seen: dict[str, set[tuple]] = {}
    for recorded in launches:
        branches, known = list_branches(recorded), seen.setdefault(recorded.kernel.__name__, set())
        if not branches <= known:
            known |= branches
            yield lambda recorded=recorded: launch(recorded.kernel, (1,), *recorded.arguments, **recorded.options)
