"""`--profile STEPS`: where the time of a few steps goes, as a Chrome trace and as a short table."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from ..log import print_line

# The first steps compile kernels and fill the allocator's cache; in the last of these the profiler itself warms up.
SKIPPED = 3
TRACE, TABLE = "trace.json.gz", "operations.txt"
STEP = "ProfilerStep"


@contextlib.contextmanager
def profile_steps(count: int, steps_left: int, directory: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile `count` steps after the first `SKIPPED`, and write `trace.json.gz` and `operations.txt` into `directory`.

    A disk that is full costs the profile, not the run.

    Args:
        count: 0 profiles nothing and costs nothing. steps_left: until the run ends, and the profile with it.
    Yields:
        a function to call at the end of each step.
    """
    if count and steps_left <= SKIPPED:
        print_line(f"profile: nothing to record; the first {SKIPPED} steps are skipped", sys.stderr)
    count = min(count, steps_left - SKIPPED)
    if count <= 0:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        if steps_done < SKIPPED + count:
            return  # a signal has ended the run
        table = describe_operations(profiler.key_averages(), device)
        print_line(table)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / TABLE).write_text(table + "\n", encoding="utf-8")
            profiler.export_chrome_trace(str(directory / TRACE))
        except OSError as error:
            print_line(f"{directory}: the profile cannot be written ({error})", sys.stderr)
        else:
            print_line(f"profile: {directory / TRACE}, which https://ui.perfetto.dev shows")

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it says on stderr when it starts and stops
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=count, repeat=1)
    profiler: torch.profiler.profile | None
    profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write)
    profiler.start()
    steps_done = 0

    def note_step() -> None:
        nonlocal profiler, steps_done
        if profiler is None:
            return
        steps_done += 1
        profiler.step()  # writes after the last one
        if steps_done == SKIPPED + count:
            profiler.stop()
            profiler = None  # with all its events

    try:
        yield note_step
    finally:
        if profiler is not None:
            profiler.stop()


def describe_operations(events: Any, device: torch.device, limit: int = 10) -> str:
    """A step's regions, and its `limit` dearest operations, as a table with milliseconds, share and calls per step.

    Operations are kernels on a GPU; on a CPU they are PyTorch's operators, each without those that it calls.

    Args:
        events: the `key_averages()` of a profiler whose steps were marked.
    """
    steps = [one for one in events if one.key.startswith(STEP) and one.device_type == DeviceType.CPU]
    num_steps = max(1, sum(one.count for one in steps))
    on_gpu = device.type == "cuda"
    if on_gpu:
        found = [one for one in events if one.device_type == DeviceType.CUDA]
        whole, own = "device_time_total", "self_device_time_total"
    else:
        found = [one for one in events if one.device_type == DeviceType.CPU]
        whole, own = "cpu_time_total", "self_cpu_time_total"
    regions = [
        (one.key, getattr(one, whole), one.count)
        for one in found
        if one.is_user_annotation and not one.key.startswith(STEP)
    ]
    operations = [(one.key, getattr(one, own), one.count) for one in found if not one.is_user_annotation]
    # The host of a GPU runs ahead of it: there, times are shares of what all kernels take.
    total = sum(time for _, time, _ in operations) if on_gpu else sum(one.cpu_time_total for one in steps)
    verdict = "the kernels of a step take" if on_gpu else "a step takes"

    def write_rows(title: str, rows: list[tuple[str, float, int]]) -> list[str]:
        lines = [f"{title:60} {'ms':>10} {'share':>7} {'calls':>8}"]
        for name, time, calls in sorted(rows, key=lambda row: -row[1])[:limit]:
            share = time / max(total, 1e-9)
            lines.append(f"{name[:60]:60} {time / num_steps / 1e3:10.3f} {share:7.1%} {calls / num_steps:8.1f}")
        return lines

    return "\n".join(
        [
            f"{num_steps} steps profiled on {device}; {verdict} {total / num_steps / 1e3:,.3f} ms",
            *write_rows("region", regions),
            *write_rows("operation", operations),
        ]
    )
