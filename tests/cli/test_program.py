"""How programs end, what signals do to them, and the list of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastroberta.__main__ import PROGRAMS
from fastroberta.cli.program import StopRequest, run
from fastroberta.errors import DataError, Stopped

ROOT = Path(__file__).parent.parent.parent


def test_run_turns_errors_into_exit_codes(capsys):
    def fail(error: BaseException):
        def program():
            raise error

        return program

    assert run(lambda: None) == 0
    assert run(lambda: 3) == 3
    assert capsys.readouterr().err == ""
    assert run(fail(DataError("a.txt:3: is\n  bad"))) == 3
    assert capsys.readouterr().err == "error: a.txt:3: is bad\n"
    assert run(fail(Stopped("stopped at step 3"))) == 75
    assert capsys.readouterr().err == "stopped at step 3\n"
    assert run(fail(KeyboardInterrupt())) == 75
    with pytest.raises(ZeroDivisionError):  # our own bugs keep their traceback
        run(fail(ZeroDivisionError()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_request_notes_a_signal_and_restores_its_handler(number):
    before = signal.signal(
        number, lambda *_: None
    )  # it is ignored where the tests run under nohup or in the background
    try:
        check_stop_request(number)
    finally:
        signal.signal(number, before)


def check_stop_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        assert (stop.number, stop.name) == (None, None)
        os.kill(os.getpid(), number)
        assert (stop.number, stop.name) == (number, number.name)
        with pytest.raises(Stopped, match=f"stopped by {number.name}; nothing is lost"):
            stop.check()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_package_lists_its_programs():
    command = [sys.executable, "-m", "fastroberta"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert subprocess.run([*command, "-h"], capture_output=True, text=True, check=True).stdout == listed
    assert len(listed.splitlines()) <= 24 and max(map(len, listed.splitlines())) <= 100
    modules = (ROOT / "fastroberta").glob("*.py")
    programs = {path.stem for path in modules if "sys.exit(run(main))" in path.read_text()}
    assert programs == set(PROGRAMS)
    assert all(f"python -m fastroberta.{name} " in listed for name in programs)
    wrong = subprocess.run([*command, "train"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, listed) and "train: unexpected argument" in wrong.stderr
