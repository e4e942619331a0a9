"""How a program ends: an exit code, and one line on stderr where something went wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from ..errors import FastRobertaError, Stopped


def run(program: Callable[[], int | None]) -> int:
    """Call a program's main and give its exit code: an expected error is one line on stderr, never a traceback.

    Of the processes that torchrun started, the first speaks; the others only of what did not befall the first as well.
    """
    rank = int(os.environ.get("RANK", "0"))
    before = signal.getsignal(signal.SIGTERM)
    if (
        "RANK" not in os.environ
    ):  # torchrun's processes may wait inside a library, where only the signal itself ends them
        signal.signal(signal.SIGTERM, _stop_early)
    try:
        return program() or 0
    except FastRobertaError as error:
        is_stopped = isinstance(error, Stopped)
        if rank and not is_stopped:
            time.sleep(2)  # torchrun ends this process if the first one has said it and gone
        if not (rank and is_stopped):
            start = f"rank {rank}: " if rank else "" if is_stopped else "error: "
            print(start + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Stopped.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_early(number: int, _: Any) -> None:
    """SIGTERM outside of what programs do about it themselves, as SIGINT does: nothing is there yet that could be lost."""
    raise Stopped(f"{signal.Signals(number).name} before the work began, or after; the same command starts again")
