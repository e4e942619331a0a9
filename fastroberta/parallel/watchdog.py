"""Ending a run in which a process has died or hangs, and saying which one.

Each process publishes a heartbeat and its progress in torchrun's store.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from ..errors import ProcessError

HEARTBEAT_SECONDS = 1.0
# Once something has failed, a process without a heartbeat for this many seconds is the one that died.
SILENCE_AFTER_FAILURE = 6.0
# Before that, it takes this many: a library may keep Python from running for a long time.
SILENCE = 30.0
STORE_SECONDS = 10.0  # a store that takes longer to answer is gone


class Watchdog:
    """Threads that publish the progress of this process, and end it when it makes none.

    Progress is a count: micro-batches done, gradients ready, steps ended. When one process hangs, the others wait for it in
    a reduction, with a higher count. After `timeout` seconds without progress, every process compares all counts; the
    lowest belongs to the one that hangs. Then all of them exit, and torchrun with them. A process without a heartbeat is
    reported sooner. The clock starts with the first progress, so that start-up may take any time.

    If torchrun is gone, its processes get SIGTERM: they save a checkpoint and exit, and no orphan occupies a GPU.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float):
        # A connection of its own: the first one may be blocked in a call when the watchdog has to report.
        self._store = dist.PrefixStore("fastroberta-progress", store.clone())  # type: ignore[attr-defined]  # not in its stub
        self._rank, self._size, self._timeout = rank, size, timeout
        self._who = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._count, self._where, self._changed = 0, "start", math.inf
        self._parent = os.getppid()
        self._ended = threading.Event()
        # Two threads, because the store on a frozen machine never answers, and the clock must go on.
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def note(self, where: str) -> None:
        """Count one unit of progress; `where` says what comes next."""
        self._count, self._where, self._changed = self._count + 1, where, time.monotonic()

    def pause(self) -> None:
        self._changed = math.inf

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def find_dead(self, silence: float = SILENCE_AFTER_FAILURE) -> str:
        """The processes without a heartbeat for this many seconds, in words; empty if there are none."""
        before = self._read()
        time.sleep(silence)
        after = self._read()
        if not after:
            return "the process that holds the store (rank 0, or torchrun on the first machine)"
        return ", ".join(who for rank, (beat, _, _, who) in after.items() if beat == before.get(rank, [None])[0])

    def _beat(self) -> None:
        for beat in itertools.count():  # the first at once, or nobody could say who died before it
            with contextlib.suppress(RuntimeError):  # the store is gone when torchrun is
                self._store.set(str(self._rank), json.dumps([beat, self._count, self._where, self._who]))
            if os.getppid() != self._parent:
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            if self._ended.wait(HEARTBEAT_SECONDS):
                return

    def _watch(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            waited = time.monotonic() - self._changed
            if waited > self._timeout:
                self._give_up()
            # NCCL waits for the dead as for the living, and says nothing.
            if waited > SILENCE and self._timeout - waited > SILENCE + STORE_SECONDS:
                since = self._changed
                dead = self.find_dead(SILENCE)
                if dead and since == self._changed and not self._ended.is_set():
                    self._end(
                        f"error: {dead}: gives no sign of life; when restarted, the run continues from its last checkpoint"
                    )

    def _read(self) -> dict[int, list[Any]]:
        """What each process last published, by rank; empty if the store is gone."""
        last_resort = threading.Timer(
            STORE_SECONDS, self._end, [f"error: {self._who}: the store of torchrun's first machine does not answer"]
        )
        last_resort.daemon = True
        last_resort.start()
        found = {}
        try:
            for rank in range(self._size):
                with contextlib.suppress(RuntimeError):
                    if self._store.check([str(rank)]):
                        found[rank] = json.loads(self._store.get(str(rank)))
        finally:
            last_resort.cancel()
        return found

    def _give_up(self) -> None:
        reports = self._read()
        lowest = min((count for _, count, _, _ in reports.values()), default=0)
        late = [rank for rank, report in reports.items() if report[1] == lowest]
        waiting = [rank for rank in reports if rank not in late]
        if not waiting:
            message = f"all processes are at the same point ({self._where}): check the network between them"
        else:
            names = ", ".join(f"{reports[rank][3]} at {reports[rank][2]}" for rank in late)
            message = f"the others wait for {names}"
        # One of the waiting processes reports; those that hang show their stacks, if they still can.
        if self._rank == min(waiting, default=0) or not reports:
            self._end(
                f"error: no progress for {self._timeout:g} s, {message}; when restarted, the run continues from its last "
                "checkpoint"
            )
        elif self._rank in late:
            print(f"{self._who} is here:", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr)
        self._end("")

    def _end(self, message: str) -> None:
        """Exit from this thread: the main thread is blocked inside a library."""
        if message:
            print(message, file=sys.stderr, flush=True)
        time.sleep(2 * HEARTBEAT_SECONDS)  # once this one is gone, torchrun ends the others; let them report first
        os._exit(ProcessError.exit_code)
