"""What a run reports: the files of metrics, and the progress line.

Everything here takes Python numbers: the trainer waits for the device once per logging interval, and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .errors import CheckpointError


class MetricsWriter:
    """`metrics.jsonl`, one JSON object per line, and TensorBoard's files if TensorBoard is installed.

    A line has "step", "time" (seconds since 1970) and metrics by name: train/loss, eval/accuracy. What is not finite
    becomes null, because JSON has no NaN. Every line is flushed.

    Args:
        output_dir: must exist; TensorBoard's files go to its folder tensorboard.
        resumed_step: the step of the checkpoint a run goes on from: later lines, written before the stop, are dropped,
            so that no step appears twice, and so is a line cut short by a crash. None for a new run: all are dropped.
        tensorboard: write its files too.
    """

    def __init__(self, output_dir: str | Path, *, resumed_step: int | None = None, tensorboard: bool = True):
        path = Path(output_dir) / "metrics.jsonl"
        self._path = path
        with self._explain_failure():
            _drop_lines_after(path, -1 if resumed_step is None else resumed_step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._tensorboard: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            first_step = 0 if resumed_step is None else resumed_step + 1
            self._tensorboard = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first_step)

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
            if self._tensorboard is not None:
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        with self._explain_failure():
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: cannot be written ({error}); make room, and the same command continues from the last "
                "checkpoint"
            ) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    """Whatever is given of loss, learning rate, gradient norm, tokens/s and MFU, and the time left."""
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
    """A line on stdout, or on another stream. Once the reader has gone, it and all later lines are dropped."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)  # a terminal's character set is no reason to fail
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # what is buffered goes there too, at the latest at exit
        os.close(nowhere)


class Progress:
    """The progress line: a moving bar on a terminal, elsewhere a plain line per update.

    Args:
        total_steps: of the whole run. first_step: steps done before this process began.
        stream: where to; stderr if None, so that results on stdout can be piped.
        unit: what is counted. seconds_between_lines: plain lines come no more often than this.
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
        self._reference = (first_step, time.monotonic())
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
        """Show that so many steps are done, with the metrics of the last interval."""
        line = format_line(metrics, self._estimate_seconds_left(step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
        elif time.monotonic() - self._last_line >= self._seconds_between_lines:
            self._last_line = time.monotonic()
            print_line(f"{self._unit} {step}/{self.total_steps}  {line}", self._stream)

    def _estimate_seconds_left(self, step: int) -> float | None:
        """At the mean speed since the first update, which leaves out compilation; at first, since the start."""
        now = time.monotonic()
        reference_step, reference_time = self._reference
        self._updates += 1
        if self._updates == 1:
            self._reference = (step, now)
        if step <= reference_step:
            return None
        return (self.total_steps - step) * (now - reference_time) / (step - reference_step)

    def print(self, text: str) -> None:
        """A line of text that stays, above the bar."""
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
