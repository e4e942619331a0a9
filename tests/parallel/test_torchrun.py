"""The launcher: what its exit code says, and how signals reach the processes. What those do with it: test_distributed.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fastroberta.torchrun import report

LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
# A process that saves slowly: longer than torchrun would wait, and than it takes to notice that another machine is gone.
SAVES = """
import os, pathlib, signal, sys, time
numbers = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: numbers.append(number))
machine, here = os.environ["GROUP_RANK"], pathlib.Path(sys.argv[1])
(here / f"started.{machine}").write_text(str(os.getpid()))
for _ in range(1000):
    if numbers or (here / "stop").exists():
        break
    time.sleep(0.1)
(here / "stop").touch()
time.sleep(float(sys.argv[2 + int(machine)]))
(here / f"saved.{machine}").touch()
sys.exit(75)
"""


@pytest.mark.parametrize(
    "codes, expected, said",
    [
        ([75, 75], 75, "rank 0 (process 100 on "),
        ([75, -15], 75, "rank 0"),  # ended by torchrun when the first was gone
        ([-15, -15], 75, "ended by SIGTERM"),  # stopped before training began
        ([-2, 75], 75, "rank 0"),
        ([5, -15], 5, "exit code 5"),
        ([-15, 3], 3, "rank 1 (process 101 on "),
        ([75, 7], 7, "rank 1"),  # a stop is none where a process failed
        ([75, -9], 7, "ended by SIGKILL"),
        ([-9, 1], 7, "rank 0"),
        ([1, 7], 1, "rank 0"),
        ([2, 3, 4], 4, "rank 2"),
    ],
)
def test_the_exit_code_is_that_of_the_first_who_failed(codes, expected, said, capsys):
    failures = {rank: ProcessFailure(rank, 100 + rank, code, "") for rank, code in enumerate(codes)}
    for rank, failure in failures.items():
        failure.timestamp = 1000 if rank == 2 else 2000 + rank
    assert report(failures) == expected
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def start(*arguments, **options):
    command = [sys.executable, "-m", "fastroberta.torchrun", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def finish(process):
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in errors
    return process.returncode, errors


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def write(path, text):
    path.write_text(text)
    return path


def test_exit_codes_pass_and_who_was_stopped_is_not_started_again(tmp_path):
    program = write(
        tmp_path / "program.py",
        "import os, sys; print('x', file=open(sys.argv[1], 'a')); sys.exit(int(sys.argv[2 + int(os.environ['RANK'])]))",
    )
    for codes, tries in (((0, 0), 2), ((0, 3), 4), ((0, 75), 2)):
        arguments = ("--standalone", "--nproc_per_node=2", "--max-restarts=1", program, tmp_path / str(codes), *codes)
        code, errors = finish(start(*arguments))
        assert code == max(codes), errors
        assert len((tmp_path / str(codes)).read_text().split()) == tries
        assert errors.count("rank 1 (process") == (code != 0) and "rank 0" not in errors


def test_bad_arguments_are_one_line():
    for arguments, message in (
        (["--signals-to-handle=SIGFOO", "x.py"], "error: --signals-to-handle: 'SIGFOO' is not a signal"),
        (["--nproc_per_node=many", "x.py"], "error: torchrun: Unsupported nproc_per_node value: many"),
        (["--nproc_per_node=0", "x.py"], "error: torchrun: nproc_per_node must be > 0; check its options"),
        (["--nnodes=0", "x.py"], "error: torchrun: min_nodes must be > 0"),
    ):
        code, errors = finish(start(*arguments))
        assert code == 2 and errors.startswith(message) and errors.count("\n") == 1


@LINUX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_waited_for(tmp_path, number):
    """However long it takes; and nohup is respected."""
    process = start(
        "--standalone", "--nproc_per_node=1", write(tmp_path / "saves.py", SAVES), tmp_path, 4,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    wait_for((tmp_path / "started.0").exists)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert not (tmp_path / "stop").exists() and process.poll() is None
    process.send_signal(number)
    time.sleep(1)
    process.send_signal(number)
    code, errors = finish(process)
    assert code == 75, errors
    assert (tmp_path / "saved.0").exists()


@LINUX
def test_stopping_one_machine_gives_75_on_all(tmp_path):
    """The first one's torchrun, and the store with it, is gone before the second one has saved."""
    program = write(tmp_path / "saves.py", SAVES)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    machine = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={place}", "--max-restarts=1")
    first = start(*machine, program, tmp_path, 0, 4)
    wait_for(lambda: handles(first.pid, signal.SIGTERM))
    second = start(*machine, program, tmp_path, 0, 4)
    wait_for(lambda: all((tmp_path / f"started.{rank}").exists() for rank in range(2)))
    first.send_signal(signal.SIGTERM)
    for process in (first, second):
        code, errors = finish(process)
        assert code == 75, errors
    assert all((tmp_path / f"saved.{rank}").exists() for rank in range(2))


@LINUX
def test_a_signal_while_waiting_for_other_machines(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    process = start("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "x.py")

    def listens():
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            return True
        return False

    wait_for(listens)
    time.sleep(1)  # the store is there just before torchrun begins to wait
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == 75 and "the same command starts again" in errors


def handles(pid, number):
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
