"""Where a step's time goes, read from torch.profiler's trace of the step itself.

The product's step marks its regions with `torch.profiler.record_function`. On a CPU a region lasts as long as its block.
On a GPU the host runs ahead, so a region gets the time of the kernels that were launched while the host was inside it,
on whichever thread: the backward launches its kernels from autograd's.
"""

from __future__ import annotations

import bisect
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

REGIONS = ("data", "masking", "forward", "backward", "reduce", "optimizer")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


class Kernel(NamedTuple):
    """All launches of one kernel in a trace."""

    name: str
    launches: int
    seconds: float


def record_trace(work: Callable[[], Any], device: torch.device, path: Path | None = None) -> list[dict[str, Any]]:
    """Run `work` under the profiler; returns the events of its Chrome trace, and writes that to `path` if given."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder, "trace.json")
        with profile(activities=activities) as profiler:
            work()
            if on_gpu:
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def sum_regions(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each of REGIONS that the trace holds, in that order."""
    marked = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in REGIONS]
    marked.sort(key=lambda event: event["ts"])
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    seconds: Counter[str] = Counter()
    if not launched:
        for event in marked:
            seconds[event["name"]] += event["dur"] / 1e6
    starts = [event["ts"] for event in marked]
    for event in events:
        if event.get("cat") in ON_GPU and (when := launched.get(event["args"].get("correlation"))) is not None:
            index = bisect.bisect_right(starts, when) - 1
            if index >= 0 and when <= starts[index] + marked[index]["dur"]:
                seconds[marked[index]["name"]] += event["dur"] / 1e6
    return {name: seconds[name] for name in REGIONS if name in seconds}


def count_launches(events: Sequence[dict[str, Any]]) -> int:
    """Kernels launched on a GPU, without the driver's copies and fills."""
    return sum(event.get("cat") == "kernel" for event in events)


def count_host_work(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What the host does in a trace: PyTorch's operations, and calls of CUDA that launch, copy or fill."""
    calls = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    return {
        "operations": sum(event.get("cat") == "cpu_op" for event in events),
        "launches": sum(any(kind in name for kind in ("Launch", "Memcpy", "Memset")) for name in calls),
    }


def estimate_kernels(events: Sequence[dict[str, Any]]) -> int:
    """How many kernels a GPU would launch for the PyTorch operations of a CPU's trace.

    One for each operation that computes and calls no other that does; operations on lists of tensors are single kernels.
    """
    operations = [event for event in events if event.get("cat") == "cpu_op" and _computes(event["name"])]
    operations.sort(key=lambda one: (one["tid"], one["ts"], -one["dur"]))
    count, inside = 0, (None, 0.0)  # a thread, and until when it is inside an operation that has been counted
    for one, following in zip(operations, [*operations[1:], None]):
        thread, end = one["tid"], one["ts"] + one["dur"]
        if thread == inside[0] and one["ts"] < inside[1]:
            continue
        calls_another = following is not None and following["tid"] == thread and following["ts"] < end
        if one["name"].startswith(("aten::_foreach", "aten::_fused")) or not calls_another:
            count += 1
            inside = thread, end
    return count


def _computes(name: str) -> bool:
    """Whether a PyTorch operation is neither a view nor an empty tensor."""
    library, _, name = name.partition("::")
    if library != "aten" or name.startswith(
        ("empty", "new_empty", "resize", "_unsafe_view", "as_strided_", "promote_types")
    ):
        return False
    operation = getattr(torch.ops.aten, name, None)
    overloads = operation.overloads() if operation is not None else []
    returned = [[one.alias_info for one in getattr(operation, overload)._schema.returns] for overload in overloads]
    return not any(aliases and all(one is not None and not one.is_write for one in aliases) for aliases in returned)


def sum_kernels(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """The GPU's kernels, copies and fills by name, the dearest first; on a CPU PyTorch's operations."""
    on_gpu = any(event.get("cat") in ON_GPU for event in events)
    chosen = [event for event in events if event.get("cat") in (ON_GPU if on_gpu else ("cpu_op",))]
    launches, seconds = Counter(event["name"] for event in chosen), Counter()  # type: ignore[var-annotated]
    for event in chosen:
        seconds[event["name"]] += event["dur"] / 1e6
    return [Kernel(name, launches[name], total) for name, total in seconds.most_common()]
