"""Time, memory and launches of some work, the rates a machine reaches, and what machine it is.

On a GPU, CUDA events surround each part. Before every run the L2 cache is overwritten and the GPU is kept busy for a
moment, so that the host is ahead and gaps between launches do not count (they do in the training benchmark, which times
whole steps). On a CPU the clock is read. What is compared takes turns, A B C A B C, and ratios are taken within a turn, so
that other work on a shared machine affects all of them alike. Clock rates are read, never set.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

PACKAGES = (
    "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "flash-attn", "apex", "numpy", "datasets",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
BUSY_CYCLES = 1_000_000  # about 0.6 ms on a GPU: longer than the host takes to launch one run


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, first and third quartile."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


class Marks:
    """Points in time on a device, in the order of the work given to it."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._points: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next; on a GPU the host waits for the last one."""
        if not self._on_gpu:
            return [after - before for before, after in zip(self._points, self._points[1:])]
        self._points[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in zip(self._points, self._points[1:])]


class CacheFlush:
    """Overwrites a GPU's L2 cache and keeps the GPU busy while the host gets ahead; does nothing on a CPU."""

    def __init__(self, device: torch.device):
        self._buffer = None
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        if self._buffer is not None:
            self._buffer.zero_()
            torch.cuda._sleep(BUSY_CYCLES)


def time_in_turn(
    runs: Mapping[str, Callable[[], Marks]], device: torch.device, *, rounds: int, repeats: int = 1
) -> dict[str, list[list[float]]]:
    """Time each of `runs` once untimed, then in `rounds` turns of `repeats` runs.

    Returns:
        For each name and turn, the median seconds between the marks of a run.
    """
    flush = CacheFlush(device)
    for run in runs.values():
        run().seconds()
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken = []
            for _ in range(repeats):
                flush()
                taken.append(run())
            parts = zip(*(marks.seconds() for marks in taken))
            times[name].append([statistics.median(part) for part in parts])
    return times


def measure_peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that `work` allocates at its peak on top of what is there; None on a CPU, which does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def mark_around(work: Callable[[], Any], device: torch.device) -> Callable[[], Marks]:
    """`work` as `time_in_turn` takes it: with a mark before and after."""

    def run() -> Marks:
        marks = Marks(device)
        work()
        marks.mark()
        return marks

    return run


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches now: bytes/s of a large copy (read and written), FLOP/s of a large matrix product."""
    on_gpu = device.type == "cuda"
    # On a CPU, four times the largest caches; the product is large enough to keep all cores busy.
    source = torch.ones(2**30 if on_gpu else 2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 2048
    a, b = (torch.randn((size, size), device=device).to(dtype) for _ in range(2))  # zeros would run faster

    works = {
        "copy": mark_around(lambda: target.copy_(source), device),
        "matmul": mark_around(lambda: torch.mm(a, b), device),
    }
    times = time_in_turn(works, device, rounds=5, repeats=5 if on_gpu else 1)
    fastest = {name: min(seconds for (seconds,) in turns) for name, turns in times.items()}
    return {
        "copy_bytes_per_second": 2 * source.numel() / fastest["copy"],
        "matmul_flops_per_second": 2 * size**3 / fastest["matmul"],
    }


def choose_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def package_version(name: str) -> str | None:
    """The installed version of a package, or None. The `apex` of the package index, another project, counts as none."""
    try:
        if name == "apex":
            from apex.optimizers import FusedLAMB  # noqa: F401
        return metadata.version(name)
    except (ImportError, metadata.PackageNotFoundError):
        return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, commit, device, driver, and what may disturb: load, clock, throttling."""
    machine: dict[str, Any] = {
        "device": device.type,
        "name": _cpu_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "commit": _commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "cpu": {
            "name": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["name"] = properties.name
        machine["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            **_driver(str(properties.uuid)),
        }
    return machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of this checkout, with "+" where files differ from it; "unknown" where git does not tell."""
    here = Path(__file__).parent

    def ask(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # What the benchmarks write does not change what they measure.
        changed = ask("status", "--porcelain", "--", ":/", ":(exclude)results")
        return ask("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _driver(uuid: str) -> dict[str, Any]:
    """Driver and clocks as NVML tells them."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # nvidia-ml-py missing, or a driver that does not answer
        return {"nvml": f"{type(error).__name__}: {error}"}
    facts: dict[str, Any] = {}
    handle = None
    for name, query, arguments in (
        ("driver", "nvmlSystemGetDriverVersion", ()),
        ("handle", "nvmlDeviceGetHandleByUUID", (f"GPU-{uuid}",)),
        ("max_sm_clock_mhz", "nvmlDeviceGetMaxClockInfo", (1,)),
        ("sm_clock_mhz", "nvmlDeviceGetClockInfo", (1,)),
        ("memory_clock_mhz", "nvmlDeviceGetClockInfo", (2,)),
        ("power_limit_milliwatts", "nvmlDeviceGetEnforcedPowerLimit", ()),
        ("mode", "nvmlDeviceGetComputeMode", ()),
    ):
        if name not in ("driver", "handle"):
            if handle is None:
                continue
            arguments = (handle, *arguments)
        try:
            value = getattr(pynvml, query)(*arguments)
        except (pynvml.NVMLError, AttributeError):
            continue
        if name == "handle":
            handle = value
        else:
            facts[name] = value
    pynvml.nvmlShutdown()
    return facts
