"""What a run reports: metrics in files and to experiment trackers, and the progress line.

Everything here takes Python numbers: the trainer waits for the device once per logging interval, and nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .errors import CheckpointError, ConfigurationError


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of these trackers are installed, without importing them. Raises ConfigurationError."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigurationError(f"report_to = {name}: is not installed; pip install 'fastroberta[{name}]'")


class MetricsWriter:
    """`metrics.jsonl`, one JSON object per line, and the trackers that are asked for.

    A line has "step", "time" (seconds since 1970) and metrics by name: train/loss, eval/accuracy. Values that are not
    finite become null, because JSON has no NaN. Every line is flushed.

    A tracker that fails later is dropped with a line on stderr, and the run goes on.

    Args:
        output_dir: must exist.
        resumed_step: step of the checkpoint that the run continues from. Later lines, and a line cut short by a crash,
            are dropped, so that no step appears twice. None for a new run: all lines are dropped.
        report_to: names of trackers: "tensorboard", "trackio", "wandb".
        settings: of the run, for trackers that show them.
    Raises:
        ConfigurationError: a tracker is not installed or cannot start.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        resumed_step: int | None = None,
        report_to: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        path = Path(output_dir) / "metrics.jsonl"
        self._path = path
        check_trackers(report_to)
        with self._explain_failure():
            _drop_lines_after(path, -1 if resumed_step is None else resumed_step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._trackers: dict[str, TensorBoard | Tracker] = {}
        for name in report_to:
            try:
                if name == "tensorboard":
                    self._trackers[name] = TensorBoard(path.parent, resumed_step)
                else:
                    self._trackers[name] = Tracker(name, path.parent, resumed_step is not None, settings or {})
            except Exception as error:  # of a package that we do not know, or of the network
                self.close()
                reason = " ".join(str(error).split())
                raise ConfigurationError(
                    f"report_to = {name}: cannot start ({reason}); fix that, or leave it out"
                ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line.

        Raises:
            CheckpointError: the disk is full, or not writable any more.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"step": step, "time": round(time.time(), 3)} | finite
        with self._explain_failure():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        for name, tracker in [*self._trackers.items()]:
            with self._drop_if_it_fails(name):
                tracker.write(step, metrics)

    def close(self) -> None:
        """Flush and close the file, and end the trackers."""
        for name, tracker in [*self._trackers.items()]:
            with self._drop_if_it_fails(name):
                tracker.close()
        with self._explain_failure():
            self._file.close()

    @contextlib.contextmanager
    def _drop_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the network, a full disk, or a fault of the package: no reason to stop a run
            del self._trackers[name]
            print_line(f"{name}: {' '.join(str(error).split())}; the run goes on without it", sys.stderr)

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: cannot be written ({error}); free some space, and the same command continues from the last "
                "checkpoint"
            ) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorBoard:
    """TensorBoard's files in `directory`/tensorboard; a run that continues takes back the steps after `resumed_step`."""

    def __init__(self, directory: Path, resumed_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        first_step = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A run of trackio or Weights & Biases, which are called alike. Its name is kept in `directory` to continue it.

    Args:
        package: "trackio" or "wandb"; TRACKIO_PROJECT or WANDB_PROJECT in the environment names the project.
    """

    def __init__(self, package: str, directory: Path, is_resumed: bool, settings: Mapping[str, Any]):
        path = directory / f"{package}-run"
        if not (is_resumed and path.exists()):
            path.write_text(f"{directory.resolve().name}-{secrets.token_hex(3)}", encoding="utf-8")
        name = path.read_text(encoding="utf-8")
        project = os.environ.get(f"{package.upper()}_PROJECT", "fastroberta")
        more = {"id": name, "dir": str(directory)} if package == "wandb" else {}
        self._module = importlib.import_module(package)
        self._run = self._module.init(project=project, name=name, config=dict(settings), resume="allow", **more)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


def _drop_lines_after(path: Path, last_step: int) -> None:
    """Rewrite a metrics file without the lines of later steps; a crash meanwhile leaves the old file or the new one."""
    if not path.exists():
        return
    rewritten = path.with_name(path.name + ".new")
    with open(path, "rb") as old, open(rewritten, "wb") as new:
        for line in old:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a run that was killed
            if isinstance(step, int) and step <= last_step and line.endswith(b"\n"):
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(rewritten, path)


# The metrics of the progress line: name, label before, format, factor.
_SHOWN = (
    ("train/loss", "loss ", "{:.4f}", 1.0),
    ("train/learning_rate", "lr ", "{:.2e}", 1.0),
    ("train/grad_norm", "grad norm ", "{:.3f}", 1.0),
    ("throughput/megabytes_per_second", "MB/s ", "{:,.1f}", 1.0),
    ("throughput/tokens_per_second", "tokens/s ", "{:,.0f}", 1.0),
    ("throughput/mfu", "MFU ", "{:.1f}%", 100.0),
)


def format_line(metrics: Mapping[str, float], seconds_left: float | None) -> str:
    """A line of loss, learning rate, gradient norm, tokens/s and MFU, as far as they are given, and the time left."""
    parts = [label + form.format(metrics[name] * factor) for name, label, form, factor in _SHOWN if name in metrics]
    parts.append(f"ETA {'?' if seconds_left is None else format_seconds(seconds_left)}")
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """12:05, 3:12:05, or 2d 3:12:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if hours == 0:
        return f"{minute}:{second:02d}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line to stdout, or to another stream. Once nobody reads the stream any more, lines are dropped."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)  # a terminal's character set is no reason to fail
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # buffered text goes there too, at exit at the latest
        os.close(nowhere)


class Progress:
    """The progress line: a moving bar on a terminal, elsewhere a plain line per update.

    Args:
        total_steps: of the whole run. first_step: steps done before this process began.
        stream: where to print; stderr if None, so that results on stdout can be piped.
        unit: what is counted. seconds_between_lines: least time between plain lines.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        *,
        unit: str = "step",
        seconds_between_lines: float = 0.0,
    ):
        self.total_steps = total_steps
        self._unit = unit
        self._seconds_between_lines = seconds_between_lines
        self._last_line = time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self._reference = (first_step, time.monotonic())  # from which on the speed counts
        self._updates = 0
        self._bar: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn(unit),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
            )
            self._bar = Bar(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the number of steps done, with the metrics of the last interval."""
        line = format_line(metrics, self._estimate_seconds_left(step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
        elif time.monotonic() - self._last_line >= self._seconds_between_lines:
            self._last_line = time.monotonic()
            print_line(f"{self._unit} {step}/{self.total_steps}  {line}", self._stream)

    def leave_out(self, step: int, until: float) -> None:
        """Leave the steps up to `step` out of the speed. Before the first update only.

        Args:
            until: when that step ended, by time.monotonic().
        """
        if self._updates == 0:
            self._reference = (step, until)

    def _estimate_seconds_left(self, step: int) -> float | None:
        """At the mean speed since the first update, because what came before it is slower; at first, since the start."""
        now = time.monotonic()
        reference_step, reference_time = self._reference
        self._updates += 1
        if self._updates == 1:
            self._reference = (step, now)
        if step <= reference_step:
            return None
        return (self.total_steps - step) * (now - reference_time) / (step - reference_step)

    def print(self, text: str) -> None:
        """Print a line that stays above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print_line(text, self._stream)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
