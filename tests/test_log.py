"""The files of metrics and the progress line."""

from __future__ import annotations

import importlib.machinery
import io
import json
import math
import subprocess
import sys
import types

import pytest

from fastroberta import log
from fastroberta.errors import CheckpointError, ConfigurationError
from fastroberta.log import MetricsWriter, Progress, format_seconds, print_line


def read_lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_json_with_null_for_what_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"train/loss": 2.5, "train/grad_norm": math.nan, "train/accuracy": -math.inf})
        (line,) = read_lines(tmp_path)  # flushed before it is closed
    assert line.pop("time") > 1.7e9
    assert line == {"step": 10, "train/loss": 2.5, "train/grad_norm": None, "train/accuracy": None}


def test_resuming_drops_later_lines(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (0, 10, 20, 30):
            writer.write(step, {"train/loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "train/lo')  # the process was killed while it wrote
    with MetricsWriter(tmp_path, resumed_step=20) as writer:
        writer.write(30, {"train/loss": 2.0})
    assert [(line["step"], line["train/loss"]) for line in read_lines(tmp_path)] == [(0, 1), (10, 1), (20, 1), (30, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_is_atomic(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"train/loss": 1.0})
        writer.write(20, {"train/loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(log.os, "replace", crash)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be written \(disk full\); free some space"):
        MetricsWriter(tmp_path, resumed_step=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_new_run_starts_an_empty_file(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(0, {"eval/loss": 1.0})
    assert len(read_lines(tmp_path)) == 1


def test_tensorboard_holds_the_same_numbers_and_no_step_twice(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, report_to=["tensorboard"]) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": float(step)})
    with MetricsWriter(tmp_path, resumed_step=2, report_to=["tensorboard"]) as writer:
        writer.write(3, {"train/loss": 30.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30)]


@pytest.fixture(params=["trackio", "wandb"])
def tracker(request, monkeypatch):
    """The calls that a package gets; both are called alike."""
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append((step, metrics))
            if metrics.get("train/loss") == -1:
                raise ConnectionError("no\nnetwork")

    def init(**options):
        calls.append(options)
        if "CANNOT" in options["project"]:
            raise RuntimeError("not logged in")
        return Run()

    module = types.ModuleType(request.param)
    module.init, module.finish = init, lambda: calls.append("finish")
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, calls


def test_a_tracker_gets_every_line_and_is_continued(tracker, tmp_path):
    name, calls = tracker
    for resumed_step, step in ((None, 1), (1, 2), (None, 1)):
        with MetricsWriter(tmp_path, resumed_step=resumed_step, report_to=[name], settings={"seed": 1}) as writer:
            writer.write(step, {"train/loss": 2.5})
    assert calls[1::3] == [(1, {"train/loss": 2.5}), (2, {"train/loss": 2.5}), (1, {"train/loss": 2.5})]
    assert calls[2::3] == ["finish"] * 3
    first, second, third = calls[::3]
    assert first == second and first["resume"] == "allow" and first["config"] == {"seed": 1}
    assert first["name"] == first.get("id", first["name"]) != third["name"]  # a new run has a new name
    assert first["name"].startswith(f"{tmp_path.name}-") and first["project"] == "fastroberta"


def test_a_tracker_that_fails_does_not_end_the_run(tracker, tmp_path, capsys, monkeypatch):
    name, calls = tracker
    with MetricsWriter(tmp_path, report_to=[name]) as writer:
        for step, loss in enumerate((3, -1, 2)):
            writer.write(step, {"train/loss": loss})
    assert capsys.readouterr().err == f"{name}: no network; the run goes on without it\n"
    assert len(read_lines(tmp_path)) == 3 and len(calls) == 3  # init and two steps
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "CANNOT")
    with pytest.raises(ConfigurationError, match=rf"report_to = {name}: cannot start \(not logged in\)"):
        MetricsWriter(tmp_path, report_to=[name])


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_missing_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=rf"report_to = {name}: is not installed; pip install 'fastroberta"):
        MetricsWriter(tmp_path, report_to=[name])


def test_trackio_holds_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage", exc_type=ImportError).SQLiteStorage
    for resumed_step, step in ((None, 10), (10, 20)):
        with MetricsWriter(tmp_path, resumed_step=resumed_step, report_to=["trackio"]) as writer:
            writer.write(step, {"train/loss": 1.0 / step})
    (run,) = storage.get_runs("fastroberta")
    lines = storage.get_logs("fastroberta", run)
    assert [(line["step"], line["train/loss"]) for line in lines] == [(10, 0.1), (20, 0.05)]


# The progress line.


METRICS = {
    "train/loss": 5.27,
    "train/learning_rate": 6e-4,
    "train/grad_norm": 0.5,
    "throughput/tokens_per_second": 12345.6,
    "throughput/mfu": 0.4123,
}


def test_progress_without_a_terminal_is_plain_lines(clock):
    stream = io.StringIO()
    with Progress(100, first_step=10, stream=stream) as progress:
        clock.now += 50  # compiling
        progress.update(20, METRICS)
        clock.now += 10
        progress.update(40, METRICS)
        progress.print("eval loss 4.5 [not markup]")
    first, second, third = stream.getvalue().splitlines()
    shown = "loss 5.2700  lr 6.00e-04  grad norm 0.500  tokens/s 12,346  MFU 41.2%"
    assert first == f"step 20/100  {shown}  ETA 6:40"  # 80 steps at 5 s, the only speed known
    assert second == f"step 40/100  {shown}  ETA 0:30"  # 60 steps at 0.5 s: compiling does not count any more
    assert third == "eval loss 4.5 [not markup]"


def test_progress_leaves_out_the_first_step(clock):
    stream = io.StringIO()
    with Progress(100, first_step=10, stream=stream) as progress:
        clock.now += 50  # compiling
        progress.leave_out(11, clock.now)
        clock.now += 9
        progress.update(20, {})
    assert stream.getvalue() == "step 20/100  ETA 1:20\n"


def test_progress_shows_what_there_is(clock):
    stream = io.StringIO()
    Progress(100, stream=stream).update(0, {"train/loss": math.nan})
    assert stream.getvalue() == "step 0/100  loss nan  ETA ?\n"


def test_progress_on_a_terminal_is_one_line_that_moves(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with Progress(100, stream=stream) as progress:
        clock.now += 10
        progress.update(50, METRICS)
        progress.print("eval loss 4.5 [not markup]")
    text = stream.getvalue()
    assert "50/100" in text
    assert "tokens/s 12,346" in text
    assert "ETA 0:10" in text
    assert "eval loss 4.5 [not markup]" in text
    assert "\x1b[2K" in text  # the line is erased and drawn again


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (11525, "3:12:05"), (184325, "2d 3:12:05")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_import_is_light():
    code = "import sys, fastroberta.log; print({'torch', 'rich', 'tensorboard', 'pynvml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_line_survives_a_narrow_character_set():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_line("loss \u2581\u2588", stream)
    assert stream.buffer.getvalue() == b"loss ??\n"
