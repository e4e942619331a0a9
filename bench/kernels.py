"""Every operation against what a user would use instead: errors, then time, bandwidth or FLOP/s, and memory.

Ratios are taken turn by turn: the other implementation's time over ours. Above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .case import EAGER, OURS, SIZES, SMALL, Absent, Case, Setting
from .measure import choose_dtype, measure_ceilings, measure_peak_bytes, spread, time_in_turn
from .record import Run, default_path
from .trace import count_launches, record_trace

# File of each operation: its SETTINGS and make_case.
OPERATIONS = ("attention", "cross_entropy", "layer_norm", "gelu", "geglu", "rotary", "masking", "embedding", "lamb")
SMALL_OPERATIONS = ("attention", "cross_entropy", "layer_norm", "gelu", "embedding")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--only", choices=OPERATIONS, action="append", help="this operation (may be repeated)")
    parser.add_argument("--model", choices=SIZES, help="sizes of this model instead of base and large")
    parser.add_argument("--small", action="store_true", help="small calls only, against PyTorch eager")
    parser.add_argument("--quick", action="store_true", help="fewer settings and turns")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add to")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after this time")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(device)
    run = Run("kernels", arguments.out or default_path(device), device, {"quick": arguments.quick})
    ceilings = run.add("ceilings", dtype=str(dtype), **measure_ceilings(device, dtype))
    print(
        f"{run.machine['name']}: copies {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s, multiplies "
        f"{ceilings['matmul_flops_per_second'] / 1e12:,.2f} TFLOP/s in {dtype}"
    )
    end = time.monotonic() + arguments.seconds
    wrong = 0
    for name in arguments.only or (SMALL_OPERATIONS if arguments.small else OPERATIONS):
        operation = importlib.import_module(f".{name}", __package__)
        for setting in choose_settings(
            operation.SETTINGS,
            quick=arguments.quick,
            on_gpu=device.type == "cuda",
            model=arguments.model,
            small=arguments.small,
        ):
            if time.monotonic() > end:
                print(f"{name} {setting}: not measured, the time is up")
                run.add("kernel", operation=name, setting=setting._asdict(), status="skipped", reason="the time is up")
                continue
            case = operation.make_case(setting, device, dtype)
            lines = measure_case(case, device, ceilings, quick=arguments.quick)
            print_case(case, lines)
            for line in lines:
                run.add("kernel", **line)
                wrong += line["status"] == "wrong" and line["implementation"] == OURS
            del case, lines
            torch._dynamo.reset()  # a setting's compiled functions are not needed by the next
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(f"results: {run.path}")
    if wrong:
        print(f"{wrong} of our own results are wrong", file=sys.stderr)
    return int(wrong > 0)


def choose_settings(
    settings: Sequence[Setting], *, quick: bool, on_gpu: bool, model: str | None = None, small: bool = False
) -> list[Setting]:
    """All of them. With `quick`, those of roberta-base, and on a CPU full sequences only.

    With `small`, full sequences of the sizes in SMALL, for the operations that work on rows.
    """
    if small:
        settings = [s for s in settings if s.layout in ("full", "plain")]
        return list(dict.fromkeys(s._replace(model=name) for name in SMALL for s in settings))
    if quick:
        settings = [s for s in settings if s.model == "base" and (on_gpu or s.layout in ("full", "plain", "window"))]
    return list(dict.fromkeys(s._replace(model=model or s.model) for s in settings))


def measure_case(case: Case, device: torch.device, ceilings: dict[str, Any], *, quick: bool) -> list[dict[str, Any]]:
    """A line for each implementation: it is checked and, if right, timed in turn with the others."""
    lines: dict[str, dict[str, Any]] = {}
    functions: dict[str, Any] = {}
    is_small = case.setting.model in SMALL
    for name in case.implementations:
        if is_small and name not in (EAGER, OURS):
            continue
        line = lines[name] = {
            "operation": case.operation,
            "setting": case.setting._asdict(),
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "implementation": name,
            "status": "ok",
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA tells in warnings why a backend does not take what it is given
                verdict = case.check(name)
            line["error"] = verdict.error
            if verdict.fault:
                line |= {"status": "wrong", "reason": verdict.fault}
            else:
                functions[name] = case.implementations[name](case.setting.dropout)
        except Absent as absence:
            line |= {"status": "absent", "reason": str(absence)}
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            line |= {"status": "failed", "reason": f"{type(error).__name__}: {reason}"}
    if not functions:
        return list(lines.values())

    def bind(name: str):
        return lambda: case.run(functions[name])

    runs = {name: bind(name) for name in functions}
    on_gpu = device.type == "cuda"
    repeats = 50 if is_small else 5 if on_gpu else 1
    times = time_in_turn(runs, device, rounds=5 if quick else 9, repeats=repeats)
    for name, turns in times.items():
        line = lines[name]
        totals = [sum(parts) for parts in turns]
        line["seconds"] = {"both" if case.upstream is not None else "forward": spread(totals)._asdict()}
        if case.upstream is not None:
            for index, part in enumerate(("forward", "backward")):
                line["seconds"][part] = spread([parts[index] for parts in turns])._asdict()
        median = statistics.median(totals)
        work = case.forward + case.backward
        line["flops_per_second"] = work.flops / median
        line["bytes_per_second"] = work.bytes / median
        line["share_of_roofline"] = work.floor(ceilings) / median
        line["intensity"] = work.flops / work.bytes
        if OURS in times:
            line["ratio"] = spread([total / sum(ours) for total, ours in zip(totals, times[OURS])])._asdict()
        line["peak_bytes"] = measure_peak_bytes(runs[name], device)
        line["launches"] = count_launches(record_trace(runs[name], device)) if on_gpu else None
    if on_gpu:
        read_clock(lines)
    return list(lines.values())


def read_clock(lines: dict[str, dict[str, Any]]) -> None:
    """Add clock rate and throttling, read right after the measurement, to every line that was timed."""
    from fastroberta.gpu_monitor import open_gpu_monitor

    monitor = open_gpu_monitor(str(torch.cuda.get_device_properties(0).uuid))
    if monitor is None:
        return
    sample = monitor.sample(0)
    monitor.close()
    for line in lines.values():
        if "seconds" in line:
            line["clock"] = {name: sample[name] for name in ("gpu/sm_clock_mhz", "gpu/throttled") if name in sample}


def print_case(case: Case, lines: Sequence[dict[str, Any]]) -> None:
    """A table of one case."""
    print(f"\n{case.operation}  {case.setting}  {case.shape}  {str(case.dtype).removeprefix('torch.')}")
    in_flops = case.forward.flops > 0
    print(
        f"  {'':24} {'error':>8} {'forward':>9} {'backward':>9} {'both, ms':>9} {'quartiles':>17} "
        f"{'TFLOP/s' if in_flops else 'GB/s':>8} {'roofline':>8} {'peak MB':>8} {'launches':>8} {'over ours':>9}"
    )
    for line in lines:
        error = max((abs(value) for name, value in line.get("error", {}).items() if name != "noise"), default=None)
        shown = "" if error is None else f"{error:.1e}"
        if "seconds" not in line:
            print(f"  {line['implementation']:24} {shown:>8} {line['status']}: {line.get('reason', '')}")
            continue
        seconds = line["seconds"]
        total = seconds.get("both") or seconds["forward"]
        rate = line["flops_per_second"] / 1e12 if in_flops else line["bytes_per_second"] / 1e9
        parts = [
            f"{seconds[part]['median'] * 1e3:9.3f}" if part in seconds else " " * 9 for part in ("forward", "backward")
        ]
        quartiles = f"{total['low'] * 1e3:.3f} to {total['high'] * 1e3:.3f}"
        peak = "" if line["peak_bytes"] is None else f"{line['peak_bytes'] / 1e6:.0f}"
        launches = "" if line["launches"] is None else line["launches"]
        ratio = f"{line['ratio']['median']:.2f}x" if "ratio" in line else ""
        print(
            f"  {line['implementation']:24} {shown:>8} {' '.join(parts)} {total['median'] * 1e3:9.3f} {quartiles:>17} "
            f"{rate:8.3g} {line['share_of_roofline']:8.0%} {peak:>8} {launches:>8} {ratio:>9}"
        )
