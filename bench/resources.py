"""The resources of every Triton kernel, measured without a GPU: kernels are compiled ahead of time for five chips.

The calls in `bench.launch_cases` are made while launches are recorded, which tells which kernels start with which
arguments. A stand-in for Triton's CUDA driver names the chip to compile for. Triton's own JIT then does what it does
before a launch: it specialises on the arguments (types, divisibility by 16, equality to 1) and compiles each distinct
combination once, down to machine code.

For attention, LayerNorm and GELU the table also holds the least time in which the inner loop's instructions can be issued:
of two tiles without spills, that is how to tell the better one.

A configuration is at fault if it does not compile, spills registers to local memory, or needs more shared memory than a
block of the chip may have.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KERNEL_MODULES = ("attention", "layer_norm", "gelu", "embedding", "cross_entropy", "masking", "rotary", "fp8")


class Chip(NamedTuple):
    """Limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    name: str
    shared_per_block: int  # bytes a block may request
    shared_per_multiprocessor: int  # bytes; each resident block takes 1024 more than it requests
    max_warps: int
    max_blocks: int
    multiprocessors: int
    gigahertz: float  # boost clock of the data sheet


# Keys are compute capabilities times ten. Code and limits of sm_89 are those of sm_86, but for the number of blocks.
CHIPS = {
    80: Chip("A100", 163 * 1024, 164 * 1024, 64, 32, 108, 1.41),
    86: Chip("RTX 3090", 99 * 1024, 100 * 1024, 48, 16, 82, 1.695),
    90: Chip("H100", 227 * 1024, 228 * 1024, 64, 32, 132, 1.755),
    100: Chip("B200", 227 * 1024, 228 * 1024, 64, 32, 148, 1.965),
    120: Chip("RTX 5090", 99 * 1024, 100 * 1024, 48, 24, 170, 2.407),
}
REGISTERS = 65536  # of a multiprocessor, on every chip
REGISTER_UNIT, WARP_UNIT, SHARED_UNIT, RESERVED_SHARED = 256, 4, 128, 1024  # allocation granularity


class Resources(NamedTuple):
    """One configuration of one kernel on one chip."""

    kernel: str
    configuration: str  # tensor types, arguments left out, constexprs
    target: int  # compute capability times ten
    warps: int = 0  # in a block
    registers: int = 0  # of a thread
    local_bytes: int = 0  # of a thread: spilled registers
    shared_bytes: int = 0  # of a block
    blocks: int = 0  # resident on a multiprocessor
    loop: int = (
        0  # instructions of the inner loop, or of all the code where there is no loop; 0 where they are not counted
    )
    issue_ms: float = 0.0  # see `_count_issue`
    seconds: float = 0.0  # to compile, or to find in Triton's cache
    fault: str = ""

    @property
    def occupancy(self) -> float:
        """Resident warps as a share of those a multiprocessor can hold."""
        return self.blocks * self.warps / CHIPS[self.target].max_warps


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def count_resident_blocks(target: int, registers: int, shared_bytes: int, warps: int) -> int:
    """How many blocks of a kernel a multiprocessor of `target` can hold at once."""
    chip = CHIPS[target]
    warps_by_registers = REGISTERS // round_up(max(registers, 1) * 32, REGISTER_UNIT) // WARP_UNIT * WARP_UNIT
    shared_of_block = round_up(shared_bytes + RESERVED_SHARED, SHARED_UNIT)
    return min(
        chip.max_blocks,
        chip.max_warps // warps,
        warps_by_registers // round_up(warps, WARP_UNIT),
        chip.shared_per_multiprocessor // shared_of_block,
    )


class _Target:
    """What Triton's JIT asks of a driver before it compiles. The device number is the compute capability."""

    def __init__(self, target: int):
        self.target = target

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)


def _leave_interpreter() -> None:
    """Set up a worker process before it imports Triton: kernels defined for the interpreter cannot be compiled."""
    os.environ.pop("TRITON_INTERPRET", None)  # test sessions set it, and worker processes inherit it


@functools.cache
def _record(cases: tuple[str, ...], target: int) -> dict[str, list[Any]]:
    """The launches of each kernel on a chip, collected once in each worker process."""
    import torch
    from fastroberta_kernels._dispatch import record_launches

    torch.set_num_threads(1)
    launches_of: dict[str, list[Any]] = {}
    for name in cases:
        with record_launches(target) as launches:
            for case in pkgutil.resolve_name(name)():
                case()
        if not launches:
            raise ValueError(f"{name}: these cases launch no kernel, so nothing would be checked")
        for launch in launches:
            # By the module that defines it: a kernel that several modules launch is compiled once.
            home = launch.kernel.__module__.removeprefix("fastroberta_kernels.")
            launches_of.setdefault(f"{home}.{launch.kernel.__name__}", []).append(launch)
    return launches_of


def _list_kernels(cases: tuple[str, ...], target: int) -> list[str]:
    """The kernels of `cases`, most launches first, so that both processes finish at about the same time."""
    launches_of = _record(cases, target)
    return sorted(launches_of, key=lambda kernel: len(launches_of[kernel]), reverse=True)


def _describe(launch: Any) -> str:
    """Tensor types in order of appearance, omitted arguments, constexprs and options."""
    import torch

    named = dict(zip(launch.kernel.arg_names, launch.arguments))
    types = dict.fromkeys(
        str(value.dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
        for value in named.values()
        if isinstance(value, torch.Tensor)
    )
    left_out = [f"no {name.removesuffix('_ptr')}" for name, value in named.items() if value is None]
    options = [f"{name}={value}" for name, value in launch.options.items() if name != "num_warps"]
    return " ".join([*types, *left_out, *options])


def _run_cuobjdump(cubin: bytes, option: str) -> str:
    """What the cuobjdump in Triton's wheel prints about a cubin."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(cuobjdump), option, file.name], check=True, capture_output=True, text=True).stdout


def _read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread."""
    text = _run_cuobjdump(cubin, "-res-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump -res-usage: no usage found in {text!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def count_loop_instructions(sass: str) -> int:
    """Instructions of the loop with the most matrix products, in the machine code of a kernel.

    Of loops with as many products, the shortest counts. Without products it is the longest loop, and without a loop all the
    code up to the last exit.
    """
    code = [(int(address, 16), text) for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    loops = []
    for address, text in code:
        branch = re.search(r"BRA(?:\.\S+)?\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            body = [text for place, text in code if int(branch[1], 16) <= place <= address]
            loops.append((sum(re.search(r"MMA\b", text) is not None for text in body), len(body)))
    if not loops:
        return max((number for number, (_, text) in enumerate(code, 1) if "EXIT" in text), default=0)
    products = max(products for products, _ in loops)
    lengths = [length for found, length in loops if found == products]
    return min(lengths) if products else max(lengths)


def count_turns(launch: Any) -> int:
    """How often the inner loop's body runs in one layer of roberta-base's step: 64 sequences of 512 tokens, 12 heads of 64,
    3072 columns of GELU, and LayerNorm's rows of one block. 0 for other kernels."""
    tokens, options = 64 * 512, launch.options
    named = dict(zip(launch.kernel.arg_names, launch.arguments))
    if "BLOCK_M" in options:
        outer, inner = options["BLOCK_M"], options["BLOCK_N"]
        before, after = (512 if side is None else side for side in (named["window_left"], named["window_right"]))
        if "backward" in launch.kernel.__name__:  # it walks over queries for each block of keys
            outer, inner, before, after = inner, outer, after, before
        turns = 0
        for start in range(0, 512, outer):
            first = max(start - before, 0) // inner
            turns += -(-min(512, start + outer + after) // inner) - first
        return 64 * 12 * turns
    if "gelu" in launch.kernel.__name__ or "geglu" in launch.kernel.__name__:
        return tokens * 3072 // (options["ROWS"] * options["BLOCK"])
    if "layer_norm" in launch.kernel.__name__ and (options.get("IS_WHOLE") or named.get("means_ptr", launch) is None):
        return tokens // options["ROWS"]
    return 0


def _count_issue(compiled: Any, launch: Any, target: int) -> tuple[int, float]:
    """Instructions of a kernel's inner loop, and the milliseconds in which a chip can issue all its turns (`count_turns`).

    A multiprocessor has four schedulers, each of which issues one instruction of a warp in a cycle. It is a floor for this
    one resource: memory, tensor cores, exponentials, shared memory and latencies may take longer, and what is outside the
    loop comes on top.
    """
    turns = count_turns(launch)
    if not turns:
        return 0, 0.0
    loop = count_loop_instructions(_run_cuobjdump(compiled.asm["cubin"], "-sass"))
    chip = CHIPS[target]
    cycles = loop * turns * compiled.metadata.num_warps / (4 * chip.multiprocessors)
    return loop, cycles / (chip.gigahertz * 1e6)


def _compile(job: tuple[tuple[str, ...], str, int]) -> list[Resources]:
    """Compile all configurations of a kernel for a target."""
    from triton.runtime import driver

    cases, name, target = job
    driver.set_active(_Target(target))
    rows, seen, failed = [], set(), set()
    for launch in _record(cases, target)[name]:
        configuration = _describe(launch)
        if configuration in failed:
            continue
        start = time.perf_counter()
        try:
            compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
        except Exception as error:  # whatever the compiler raises is the finding
            failed.add(configuration)
            reason = (str(error).strip() or "no message").splitlines()[-1]
            rows.append(Resources(name, configuration, target, fault=f"{type(error).__name__}: {reason}"))
            continue
        if id(compiled) in seen:  # the JIT has compiled it before: same types, same constants
            continue
        seen.add(id(compiled))
        seconds = time.perf_counter() - start
        registers, local = _read_usage(compiled.asm["cubin"])
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        faults = []
        if local:
            faults.append(f"spills {local} bytes a thread")
        if shared > CHIPS[target].shared_per_block:
            faults.append(f"needs {shared} bytes of shared memory, has {CHIPS[target].shared_per_block}")
        blocks = count_resident_blocks(target, registers, shared, warps)
        rows.append(
            Resources(
                name,
                configuration,
                target,
                warps,
                registers,
                local,
                shared,
                blocks,
                *_count_issue(compiled, launch, target),
                seconds,
                "; ".join(faults),
            )
        )
    return rows


def measure_resources(names: Sequence[str] = KERNEL_MODULES, targets: Iterable[int] = CHIPS) -> list[Resources]:
    """Compile every configuration the launch cases reach, in two processes.

    Args:
        names: modules of `fastroberta_kernels`, or other functions that yield cases, as "module:function".
        targets: compute capabilities times ten, keys of `CHIPS`.
    """
    cases = tuple(name if ":" in name else f"bench.launch_cases:{name}_cases" for name in names)
    with multiprocessing.get_context("spawn").Pool(2, _leave_interpreter) as pool:
        jobs = [(cases, kernel, target) for target in targets for kernel in pool.apply(_list_kernels, (cases, target))]
        return [row for rows in pool.imap(_compile, jobs) for row in rows]


def print_table(rows: Sequence[Resources]) -> None:
    """Print a line for each kernel, configuration and chip, then the faults.

    Where the JIT compiles several kernels for one line (by divisibility, or by which tensor has which type), the one
    with the most registers is shown. For `loop` and `issue, ms` see `_count_issue`.
    """
    shown: dict[tuple, Resources] = {}
    for row in rows:
        key = (row.kernel, row.configuration, row.target)
        shown[key] = max(shown.get(key, row), row, key=lambda row: row.registers)
    lines = [
        (
            "kernel",
            "configuration",
            "chip",
            "warps",
            "registers",
            "spilled",
            "shared",
            "blocks",
            "occupancy",
            "loop",
            "issue, ms",
        )
    ]
    for row in shown.values():
        numbers = (
            row.warps,
            row.registers,
            row.local_bytes,
            row.shared_bytes,
            row.blocks,
            f"{row.occupancy:.0%}",
            row.loop or "-",
            f"{row.issue_ms:.3f}" if row.loop else "-",
        )
        lines.append((row.kernel, row.configuration, f"sm_{row.target}", *map(str, numbers)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        texts = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3])]
        numbers = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:])]
        print("  ".join(texts + numbers))
    for row in rows:
        if row.fault:
            print(f"FAULT {row.kernel} [{row.configuration}] sm_{row.target}: {row.fault}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m bench resources`: print the table. The exit status is 1 if a configuration is at fault."""
    parser = argparse.ArgumentParser(prog="python -m bench resources", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names",
        nargs="*",
        default=KERNEL_MODULES,
        metavar="NAME",
        help="modules of fastroberta_kernels, or MODULE:FUNCTION that yields launch cases (default: all modules)",
    )
    parser.add_argument(
        "--chips", type=int, nargs="+", default=list(CHIPS), choices=CHIPS, help="compute capabilities (default: all)"
    )
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    rows = measure_resources(arguments.names, arguments.chips)
    print_table(rows)
    import triton

    print(
        f"{len(rows)} configurations compiled in {time.perf_counter() - start:.1f} s by Triton {triton.__version__}, "
        f"{sum(bool(row.fault) for row in rows)} at fault"
    )
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
