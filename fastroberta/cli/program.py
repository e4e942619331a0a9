"""How a program ends: with an exit code, with one line on stderr after an error, and in good order after a signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import FastRobertaError, Stopped

# How often an idle thread of PyTorch's looks for work before it sleeps. OpenMP's own 300,000 take milliseconds, in which it
# keeps a core from whoever it waits for; these take a fraction of one (bench/LOG.md, section 12).
SPINS = 10_000


def limit_spinning() -> None:
    """Keep idle threads from taking the cores of others; to be called before torch is imported, which reads it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def run(program: Callable[[], int | None]) -> int:
    """Call a program's main and return its exit code. An expected error becomes one line on stderr, without a traceback.

    Among the processes started by torchrun, the first reports errors; the others do so only if the first has not.
    """
    rank = int(os.environ.get("RANK", "0"))
    before = signal.getsignal(signal.SIGTERM)
    # A process started by torchrun may wait inside a library, where only the signal's default action ends it.
    if "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _stop_early)
    try:
        return program() or 0
    except FastRobertaError as error:
        is_stopped = isinstance(error, Stopped)
        if rank and not is_stopped:
            time.sleep(2)  # if the first process reports the error and exits, torchrun ends this one
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
    """SIGTERM outside of a StopRequest: nothing can be lost, so stop at once, as after SIGINT."""
    raise Stopped(f"stopped by {signal.Signals(number).name}; nothing is lost, the same command starts again")


class StopRequest:
    """Records SIGINT, SIGTERM and SIGHUP within its `with` block, so that the work in hand is finished first.

    A second SIGINT interrupts at once. A second SIGTERM does not, because schedulers send it to every process and torchrun
    passes it on again. Ignored signals (SIGHUP under nohup) stay ignored; outside the main thread nothing is recorded.
    """

    number: int | None = None  # of the latest signal

    def __enter__(self) -> StopRequest:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    @property
    def name(self) -> str | None:
        """Of the latest signal, "SIGTERM" for example; None while there was none."""
        return None if self.number is None else signal.Signals(self.number).name

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.number is not None:
            raise Stopped(f"stopped by {self.name}; nothing is lost, the same command continues")
