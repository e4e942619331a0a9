"""`python -m fastroberta.torchrun`: torchrun, ending with the exit code of what it ran.

It takes torchrun's arguments and does what torchrun does, but for two things. torchrun ends with 1 whatever its processes
return; this ends with their code, so that a scheduler can tell a run that was stopped from one that failed. And where
torchrun gives its processes 30 seconds after a signal, this passes the signal on and waits: they finish the step and
save a checkpoint, and who hangs is found by the trainer's own watchdog.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing import api as multiprocessing
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError
from torch.distributed.launcher import api as launcher

from .cli.program import run
from .errors import ConfigurationError, ProcessError, Stopped

# With one of these a process ends that was asked to; by the signal itself where nothing was to be saved yet.
STOPPED = {Stopped.exit_code, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}


def main(argv: Sequence[str] | None = None) -> int:
    parser = torchrun.get_args_parser()
    parser.epilog = "Here no time limit follows a signal: --shutdown-timeout holds only where a process has failed."
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.signals_to_handle.split(",")]
    unknown = set(names) - set(signal.Signals.__members__)
    if unknown:
        raise ConfigurationError(f"--signals-to-handle: {unknown.pop()!r} is no signal; signals are written as SIGTERM")
    # Not what nohup, or a shell that put this into the background, had it ignore; torchrun would.
    names = [name for name in names if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]
    arguments.signals_to_handle = ",".join(names)
    logging.getLogger(multiprocessing.__name__).setLevel(logging.CRITICAL)  # "failed", of a process that was stopped
    launcher.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return report(error.failures)
    except SignalException as error:
        raise Stopped(f"{error.sigval.name} before any process was started; the same command starts again") from None
    except (RendezvousError, ValueError, OSError, AssertionError) as error:
        fault = str(error) or "nproc_per_node must be > 0"  # the one that it asserts without a word
        raise ConfigurationError(f"torchrun: {fault}; see its options for machines, processes and --rdzv") from error
    return 0


def report(failures: Mapping[int, ProcessFailure]) -> int:
    """The exit code of a run whose processes, by rank, ended so; one line says whose it is.

    It is that of the first who failed, other than by being stopped: a stop is one only where nobody failed.
    """
    in_time = sorted(failures.items(), key=lambda item: item[1].timestamp)
    rank, failure = next((item for item in in_time if item[1].exitcode not in STOPPED), in_time[0])
    code = failure.exitcode
    how = f"exit code {code}" if code > 0 else f"ended by {failure.signal_name()}"
    if code in STOPPED:
        code = Stopped.exit_code
    elif code < 0:
        code = ProcessError.exit_code
    print(f"rank {rank} (process {failure.pid} on {socket.gethostname()}): {how}", file=sys.stderr, flush=True)
    return code


class Agent(LocalElasticAgent):
    """torchrun's agent, which starts the processes of this machine and watches them, with other manners on signals."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._pids: list[int] | None = []  # None while processes are being started
        self._signal: int | None = None

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        # In place of torchrun's own, which raises in the middle of whatever it is doing.
        multiprocessing._terminate_process_handler = self._pass_on  # type: ignore[assignment]
        for name in os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"].split(","):
            signal.signal(signal.Signals[name], self._pass_on)
        try:
            return super()._invoke_run(role)
        except (RendezvousConnectionError, SignalException):
            if self._pcontext is None:
                raise
        # The first machine's agent, and the store with it, may be gone before this machine's processes have ended. They
        # know what to do, whether all are stopped or that machine has failed.
        while (result := self._monitor_workers(self._worker_group)).state == WorkerState.HEALTHY:
            time.sleep(self._worker_group.spec.monitor_interval)
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._pids = None
        started = super()._start_workers(worker_group)
        self._pids = list(started.values())
        if self._signal is not None:
            self._pass_on(self._signal)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode == Stopped.exit_code for failure in result.failures.values()):
            self._remaining_restarts = 0  # stopped through another machine: not to be started again by --max-restarts
        return result

    def _pass_on(self, number: int, _: FrameType | None = None) -> None:
        self._signal = number
        self._remaining_restarts = 0
        if self._pids is None:
            return  # they get it when all are there
        has_someone = False
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                has_someone = True
        if not has_someone:  # waiting for other machines
            raise SignalException(f"got {number}", signal.Signals(number))


if __name__ == "__main__":
    sys.exit(run(main))
