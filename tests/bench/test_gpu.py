"""The GPU's minutes, rehearsed on a CPU: every stage runs, leaves its lines, and ends in its time."""

from __future__ import annotations

import ast
import gzip
import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import prepare_text

from bench import gpu, stages
from bench.case import EAGER, OURS, Case, Setting, Work
from bench.record import read_lines
from bench.tiles import SWEEPS, Sweep, replace_entries
from bench.trainers import Task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def session(tmp_path):
    session = stages.Session("test", tmp_path, float("inf"), rehearse=True)
    session.add("ceilings", dtype="torch.float32", copy_bytes_per_second=1e10, matmul_flops_per_second=1e11)
    return session


def test_each_stage_is_ended_and_the_next_one_runs(tmp_path, monkeypatch, capfd):
    """One fails, one hangs, one is right: each is named, and the minutes are kept."""
    monkeypatch.setattr(gpu, "STAGES", {name: stages.Stage(None, 1, name) for name in ("fails", "hangs", "works")})
    program = "import sys, time; name = sys.argv[1]; print(name, 'began', flush=True); "
    program += "time.sleep(60 * (name == 'hangs')); sys.exit(3 * (name == 'fails'))"
    run_limited = gpu.run_limited

    def run_stage(command, *rest, **options):
        return run_limited([sys.executable, "-c", program, command[3]], *rest, **options)

    monkeypatch.setattr(gpu, "run_limited", run_stage)
    begun = time.monotonic()
    assert gpu.main(["--minutes", "0.15", "--rehearse", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - begun < 60
    lines = [line for line in read_lines(tmp_path / "results.jsonl") if line["kind"] == "stage"]
    assert {line["name"]: line["status"] for line in lines} == {"fails": 3, "hangs": "stopped", "works": 0}
    assert "failed: fails (exit status 3), hangs (stopped)" in capfd.readouterr().out
    assert (tmp_path / "log.txt").read_text().count("began") == 3


def stumble(session):
    for piece in session.each(["raises", "hangs", "works"], patience=0.2):
        if piece == "raises":
            raise RuntimeError("an illegal memory access was encountered")
        time.sleep(60 * (piece == "hangs"))
        session.add("done", piece=piece)
    return False


def run_in_fork(command, *_, **__):
    """Run a stage as `run_limited` does, without the seconds that another process needs for its imports."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        status = stages.main(command[3:])
    except BaseException:
        status = 1
    os._exit(status)


def test_a_stage_that_stumbles_is_run_again_without_the_piece_it_lost(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(stages, "STAGES", {"stumbles": stages.Stage(stumble, 1, "")})
    monkeypatch.setattr(gpu, "STAGES", stages.STAGES)
    monkeypatch.setattr(gpu, "run_limited", run_in_fork)
    assert gpu.main(["--minutes", "1", "--rehearse", "--out", str(tmp_path)]) == 1
    lines = list(read_lines(tmp_path / "results.jsonl"))
    assert [line["piece"] for line in lines if line["kind"] == "begin"] == ["raises", "hangs", "works"]
    assert [line["piece"] for line in lines if line["kind"] == "done"] == ["works"]
    assert [line["attempts"] for line in lines if line["kind"] == "stage"] == [3]
    said = capfd.readouterr()
    assert "lost raises" in said.out and "lost hangs" in said.out and "in stumble" in said.err


def test_a_log_stays_small_enough_to_be_sent_back(tmp_path):
    log = tmp_path / "log.txt"
    program = "print('x' * 99); print('y' * 99, flush=True); print('short')"
    assert gpu.run_limited([sys.executable, "-c", program], 60, log, max_bytes=150) == 0
    assert log.read_text() == "x" * 99 + "\nshort\n"


def test_hot_kernels_leave_lines_and_a_verdict(session, monkeypatch, capsys):
    monkeypatch.setattr(stages, "HOT", (("gelu", 0.0, "full"), ("masking", 0.0, "full")))
    monkeypatch.setattr(stages, "compile_in_processes", lambda *_: None)
    assert stages.check_kernels(session)
    lines = [line for line in read_lines(session.results) if line["kind"] == "kernel"]
    ours = {line["operation"]: line["differing_repeats"] for line in lines if line["implementation"] == OURS}
    assert ours == {"bias_gelu": 0, "mask_tokens": 0} and len(lines) == 4
    monkeypatch.setattr(stages, "count_differences", lambda case: 3)
    assert not stages.check_kernels(session)
    assert "WRONG: 3 of 20 runs differ" in capsys.readouterr().out


def test_a_step_is_measured_and_profiled(session, tmp_path_factory, capsys):
    texts = [f"The number {n} is followed by {n + 1}. After that comes {n + 2}, and so on." for n in range(300)]
    data = prepare_text(tmp_path_factory.mktemp("gpu"), "\n\n".join(texts), 300)
    session.make_task = lambda: Task(str(data), 1, 32, 2, 48, 32, 4, "fp32", vocabulary=500)
    assert stages.measure_step(session)
    lines = {line["kind"]: line for line in read_lines(session.results)}
    assert lines["train"]["tokens_per_second"]["median"] > 0 and lines["train"]["host_seconds_per_step"] > 0
    assert lines["profile"]["launches"] > 100 and lines["profile"]["groups"]["matrix products"]["seconds"] > 0
    assert lines["host"]["operations"] == lines["profile"]["launches"] and lines["host"]["implementation"] == OURS
    with gzip.open(session.out / "step-trace.json.gz") as trace:
        assert json.load(trace)["traceEvents"]
    assert "the host needs" in capsys.readouterr().out


@pytest.mark.slow(reason="some minutes on two cores")
def test_the_whole_rehearsal(tmp_path):
    assert gpu.main(["--minutes", "30", "--rehearse", "--out", str(tmp_path)]) == 0
    kinds = {line["kind"] for line in read_lines(tmp_path / "results.jsonl")}
    assert kinds == {
        "run", "stage", "begin", "ceilings", "product", "kernel", "train", "profile", "host", "tile", "tests", "losses",
        "quickstart",
    }  # fmt: skip
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size < 16 * 2**20 for path in files)


def make_case(function):
    x = torch.linspace(-1, 1, 64).requires_grad_()
    implementations = {EAGER: lambda p: lambda x: x * 2, OURS: lambda p: function}
    return Case(
        "toy", Setting("tiny"), "64", torch.float32, (x,), implementations, Work(1, 1), torch.ones(64), Work(1, 1),
        lambda x: x * 2,
    )  # fmt: skip


def test_runs_that_differ_in_one_bit_are_counted():
    assert stages.count_differences(make_case(lambda x: x * 2)) == 0
    calls = []

    def waver(x):
        calls.append(0)
        return x * (2 + 2e-7 * (len(calls) == 5))

    assert stages.count_differences(make_case(waver)) == 1


def test_sweeps_name_entries_that_exist_and_begin_with_todays(monkeypatch):
    for sweep in SWEEPS:
        assert len(set(sweep.candidates)) == len(sweep.candidates) > 1
        module = importlib.import_module(f"fastroberta_kernels.{sweep.operation}")
        before = getattr(module, sweep.table)
        with sweep.keep_tables():
            sweep.choose(sweep.candidates[0])
            assert callable(before) or getattr(module, sweep.table) == before
            sweep.choose(sweep.candidates[1])
            assert getattr(module, sweep.table) != before
        assert getattr(module, sweep.table) is before
    attention = importlib.import_module("fastroberta_kernels.attention")
    with monkeypatch.context() as patch:
        patch.setattr(attention, "FORWARD_BLOCKS", dict(attention.FORWARD_BLOCKS))
        patch.setattr(attention, "CHIP_FORWARD_BLOCKS", {(90, 2, 64): 0, (90, 2, 32): 0}, raising=False)
        Sweep("attention", "FORWARD_BLOCKS", (2, 64), (1, 2), 0).choose(1)
        assert attention.CHIP_FORWARD_BLOCKS == {(90, 2, 64): 1, (90, 2, 32): 0}
    with pytest.raises(LookupError, match="no entry"):
        Sweep("attention", "FORWARD_BLOCKS", (2, 63), (1, 2), 0).choose(1)
    table = {(2, 64): 1, (90, 2, 64): 2, (2, 32): 3, "sm_100": {(2, 64): 4}}
    assert replace_entries(table, (2, 64), 9) == 3
    assert table == {(2, 64): 9, (90, 2, 64): 9, (2, 32): 3, "sm_100": {(2, 64): 9}}


def test_a_sweep_shows_the_best_and_what_failed(session, monkeypatch, capsys):
    sweep = next(sweep for sweep in SWEEPS if sweep.key == "BLOCK")

    def choose(self, candidate):
        if candidate == 512:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(type(sweep), "choose", choose)
    monkeypatch.setattr(stages, "make_case", lambda *_: make_case(lambda x: x * 2))
    stages.sweep_one(session, sweep, {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": 1e11})
    shown = capsys.readouterr().out
    assert "best on sm_cpu: TILE = " in shown and "RuntimeError: out of resource: shared memory" in shown
    found = {line["candidate"]: line["status"] for line in read_lines(session.results) if line["kind"] == "tile"}
    assert found == {"256": "ok", "512": "failed", "1024": "ok"}


def test_a_profile_stands_beside_its_floors(session, capsys):
    """Kernels are grouped by name; every kernel of the product has a group."""
    task = Task("", 12, 768, 12, 3072, 512, 64, "bf16")
    ceilings = {"copy_bytes_per_second": 4.3e12, "matmul_flops_per_second": 785e12}
    events = [
        {"cat": "kernel", "name": name, "ts": 0, "dur": duration, "args": {"correlation": 1}}
        for name, duration in (("_attention_forward_kernel", 3000), ("nvjet_tst_128x256", 9000), ("unknown", 1))
    ]
    stages.report_profile(session, task, events, 3, ceilings)
    (line,) = (line for line in read_lines(session.results) if line["kind"] == "profile")
    groups = line["groups"]
    assert groups["attention, forward"]["seconds"] == pytest.approx(1e-3)
    # The floors are those of bench/LOG.md, section 1, in ms.
    for what, floor in (("attention, forward", 0.79), ("attention, backward", 1.97), ("LayerNorm, forward", 0.84),
                        ("LayerNorm, backward", 1.40), ("GELU, forward", 1.12), ("GELU, backward", 1.69)):  # fmt: skip
        assert groups[what]["floor"] * 1e3 == pytest.approx(floor, rel=0.02)
    assert groups["everything else"]["launches"] == pytest.approx(1 / 3)
    assert "attention, forward" in capsys.readouterr().out


def test_python_312_can_read_it():
    """Files parse as the oldest Python that is supported, and so as the GPU machine's."""
    for folder in ("bench", "fastroberta", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(), filename=str(path), feature_version=(3, 11))
