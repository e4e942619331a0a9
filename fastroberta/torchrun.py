"""`python -m fastroberta.torchrun`: torchrun that exits with the code of the program it ran.

It takes torchrun's arguments and differs in two points. torchrun exits with 1 whatever its processes return; this program
exits with their code, so that a scheduler can tell a run that was stopped from one that failed. And torchrun kills its
processes 30 seconds after a signal; this program forwards the signal and waits, because they finish the step and save a
checkpoint first. Should one of them hang, the trainer's own watchdog ends it.
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
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api as launcher

from .cli.program import run
from .errors import ConfigurationError, ProcessError, Stopped

# Exit codes of a process that was asked to stop; the signal itself where there was nothing to save yet.
STOPPED = {Stopped.exit_code, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}


def main(argv: Sequence[str] | None = None) -> int:
    parser = torchrun.get_args_parser()
    parser.epilog = "Here a signal sets no time limit: --shutdown-timeout applies only after a process has failed."
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.signals_to_handle.split(",")]
    unknown = set(names) - set(signal.Signals.__members__)
    if unknown:
        raise ConfigurationError(f"--signals-to-handle: {unknown.pop()!r} is not a signal; write SIGTERM, for example")
    # What nohup, or a shell that started this in the background, had ignored stays ignored.
    Agent.signals = [signal.Signals[name] for name in names if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]
    arguments.signals_to_handle = ""  # torchrun's own handlers raise an exception in the middle of whatever it is doing
    # It would complain about that, and report a process that was stopped as failed.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    launcher.LocalElasticAgent = Agent  # type: ignore[misc]  # there is no argument for it
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return report(error.failures)
    except SignalException as error:
        raise Stopped(f"{error.sigval.name} while no process was running; the same command starts again") from None
    except (RendezvousError, ValueError, OSError, AssertionError) as error:
        fault = str(error) or "nproc_per_node must be > 0"  # the one assertion without a message
        raise ConfigurationError(f"torchrun: {fault}; check its options for machines, processes and --rdzv") from error
    return 0


def report(failures: Mapping[int, ProcessFailure]) -> int:
    """The exit code of a run, given the failures by rank; prints one line that says whose code it is.

    It is that of the first process that failed. A run counts as stopped only if no process failed.
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
    """torchrun's agent, which starts and watches the processes of one machine, with another way to treat signals.

    It overrides only what PyTorch documents for those who extend its agents ("Extending the Agent").
    """

    signals: Sequence[signal.Signals] = ()

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._received: list[signal.Signals] = []
        self._num_forwarded = 0
        self._has_processes = False
        self._result = RunResult(WorkerState.INIT)

    def run(self, *arguments: Any) -> RunResult:
        for one in self.signals:
            signal.signal(one, self._receive)
        try:
            return super().run(*arguments)
        except RendezvousError:
            if self._result.state == WorkerState.INIT:
                raise
            return self._result

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received.append(signal.Signals(number))
        if not self._has_processes:  # it waits for other machines
            raise SignalException(f"got {number}", signal.Signals(number))

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._has_processes = True
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        for number in self._received[self._num_forwarded :]:
            self._num_forwarded += 1
            for worker in worker_group.workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.id, number)
        self._result = super()._monitor_workers(worker_group)
        self._has_processes = self._result.state != WorkerState.SUCCEEDED
        return self._result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        failures = self._result.failures
        # Stopped, here or through another machine: --max-restarts does not apply.
        if failures and (self._received or Stopped.exit_code in {one.exitcode for one in failures.values()}):
            raise ChildFailedError("", failures)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        super()._shutdown()

    def _shutdown(self, *arguments: Any, **options: Any) -> None:
        group = self.get_worker_group()
        # The agent of the first machine, and the store with it, may be gone while processes still run here. They know
        # what to do, whether all were stopped or that machine has failed.
        while group.state == WorkerState.HEALTHY:
            time.sleep(group.spec.monitor_interval)
            group.state = self._monitor_workers(group).state
        super()._shutdown(*arguments, **options)


if __name__ == "__main__":
    sys.exit(run(main))
