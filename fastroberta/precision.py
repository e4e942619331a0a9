"""Which precision a device multiplies matrices fast in, and what a run uses.

`auto` takes bf16 where the device is fast at it, else fp16 with a scaled loss on GPUs older than sm_80, else fp32. On a CPU
a product of a few milliseconds decides: bf16 without instructions of its own is emulated, and was measured a hundred times
slower than fp32 on a Zen 3.

`fp8` is bf16 with 8-bit factors in the products of the encoder layers (`fastroberta_kernels.fp8`). It has to be asked for:
it needs a GPU of sm_89 or later, and no run has shown yet how much it gains. A CPU emulates it, slowly, to check losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .errors import ConfigurationError

FIRST_WITH_BF16 = (8, 0)  # compute capability of GPUs whose tensor cores take bf16
FIRST_WITH_FP8 = (8, 9)
SIZE = 256  # rows of the product that decides; 34 MFLOP: under a millisecond, or 40 where bf16 is emulated


def measure_matmul_flops(
    device: torch.device | str, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """FLOP/s of a square matrix product on this device, the best of some rounds: MFU's denominator on a CPU.

    Args:
        dtype: of both factors. size: rows of both, on a CPU; a GPU gets 8,192.
        seconds: how long to measure; the warm-up comes on top. clock: which seconds.
    """
    on_gpu = torch.device(device).type == "cuda"
    size, rounds = (8192, 10) if on_gpu else (size, 1)
    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))

    def time_rounds() -> float:
        start = clock()
        for _ in range(rounds):
            torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        return clock() - start

    time_rounds()
    best, end = time_rounds(), clock() + seconds
    while clock() < end:
        best = min(best, time_rounds())
    return 2 * size**3 * rounds / best


def settle_precision(asked: str, device: torch.device, before: str | None = None) -> tuple[str, str]:
    """The precision of a run, and why, in a few words.

    Args:
        asked: `auto`, `bf16`, `fp16`, `fp32` or `fp8`. device: where products run.
        before: the precision of the checkpoint that is continued; `auto` keeps it, so that a run does not change its
            arithmetic when it moves to another machine.
    Raises:
        ConfigurationError: fp8 on a GPU that does not multiply 8-bit numbers.
    """
    is_kept = asked == "auto" and before is not None
    settled = before if is_kept else asked
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"sm_{capability[0]}{capability[1]}"
        if settled == "fp8" and capability < FIRST_WITH_FP8:
            raise ConfigurationError(
                f"precision = fp8: needs a GPU of sm_89 or later, and this one is {name}; use bf16"
            )
    if is_kept:
        assert before is not None
        return before, "as in the checkpoint"
    if device.type == "cuda":
        if asked != "auto":
            return asked, "as asked"
        if capability >= FIRST_WITH_BF16:
            return "bf16", f"tensor cores of {name} take it"
        return "fp16", f"tensor cores of {name} take no bf16"
    if asked == "fp32":
        return asked, "as asked"
    if asked == "fp8":
        return asked, "as asked, but slow: a CPU emulates it, which is good for checking losses only"
    half = torch.float16 if asked == "fp16" else torch.bfloat16
    # One thread and its own time: what else runs on the machine must not decide.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fast, slow = (
        measure_matmul_flops(device, one, size=SIZE, seconds=0.005, clock=time.thread_time)
        for one in (half, torch.float32)
    )
    torch.set_num_threads(num_threads)
    name = "fp16" if asked == "fp16" else "bf16"
    rates = f"a core multiplies {name} at {fast / 1e9:,.1f} GFLOP/s, fp32 at {slow / 1e9:,.1f}"
    if asked == "auto":
        return ("bf16" if fast > slow else "fp32"), rates
    return asked, f"as asked, but slow: {rates}" if fast < slow else "as asked"
