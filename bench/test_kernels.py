"""The same cases under pytest-benchmark: `pytest bench`, and later `pytest bench --benchmark-compare`."""

from __future__ import annotations

import importlib

import pytest
import torch

from bench.case import EAGER, OURS, Absent, Case
from bench.kernels import OPERATIONS, choose_settings
from bench.measure import choose_dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The case of the last setting: its inputs are made, and the exact result is computed, once for all implementations.
_last: dict[tuple, Case] = {}


def list_parameters():
    for name in OPERATIONS:
        operation = importlib.import_module(f"bench.{name}")
        for setting in choose_settings(operation.SETTINGS, quick=True, on_gpu=DEVICE.type == "cuda"):
            for implementation in (EAGER, OURS):
                yield pytest.param(name, setting, implementation, id=f"{name}-{setting}-{implementation}")


@pytest.mark.parametrize(("name", "setting", "implementation"), list(list_parameters()))
def test_operation(benchmark, name, setting, implementation):
    if (name, setting) not in _last:
        _last.clear()
        case = importlib.import_module(f"bench.{name}").make_case(setting, DEVICE, choose_dtype(DEVICE))
        case.check(EAGER)  # its error bounds those of the others
        _last[name, setting] = case
    case = _last[name, setting]
    try:
        verdict = case.check(implementation)
    except Absent as absence:
        pytest.skip(str(absence))
    assert verdict.fault is None, verdict.fault
    function = case.implementations[implementation](setting.dropout)
    benchmark.group = f"{case.operation}, {setting}"
    benchmark.extra_info |= {"error": verdict.error, "shape": case.shape}
    benchmark.pedantic(lambda: case.run(function).seconds(), rounds=5, warmup_rounds=1)
