"""What a run reports: floating-point operations, memory, the files of metrics, the progress line, the GPU's sensors.

Everything here takes Python numbers, so that the trainer synchronises with the device once a logging interval and
nowhere else. n tokens, m masked tokens, L layers, width d, MLP width f, vocabulary V, s tokens of attention span.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .config import ModelConfig, TrainConfig
from .errors import CheckpointError


def num_parameters(model: ModelConfig) -> int:
    """Parameters with the head, the tied decoder counted once; roberta-base with 50265 ids has 124,697,433."""
    d, vocabulary = model.hidden_size, _vocabulary(model)
    norm = 2 * d
    embeddings = (vocabulary + model.max_position_embeddings + 1) * d + norm
    head = (d * d + d) + norm + vocabulary
    return embeddings + model.num_hidden_layers * num_layer_parameters(model) + head


def num_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one encoder layer."""
    d, f = model.hidden_size, model.intermediate_size
    norm = 2 * d
    return 4 * (d * d + d) + norm + (d * f + f) + (f * d + d) + norm


def model_flops_per_step(model: ModelConfig, num_tokens: int, num_masked: int, sum_of_squared_lengths: int) -> int:
    """Operations that a training step needs, forward and backward, whatever is really executed.

    6 L (4 d^2 + 2 d f) n for the matrix products with weights, 12 L d sum(s^2) for attention, and
    6 m (d^2 + d V) for the head, which only masked tokens need (PaLM, arXiv 2204.02311, appendix B, with a
    bidirectional attention and this head). Padding, embeddings and recomputation are not counted.

    Args:
        num_tokens: n, real tokens of the step.
        num_masked: m of them.
        sum_of_squared_lengths: over all spans in which tokens see each other (sequences, or documents).
    """
    d, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    weights = 6 * layers * (4 * d * d + 2 * d * f) * num_tokens
    attention = 12 * layers * d * sum_of_squared_lengths
    head = 6 * num_masked * (d * d + d * _vocabulary(model))
    return weights + attention + head


def _vocabulary(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ValueError("metrics: model.vocab_size is not set; take it from the tokenizer")
    return model.vocab_size


# Dense bf16 matrix products in TFLOP/s with fp32 sums, as in the datasheets (fp16 for GPUs without bf16). The first
# match counts.
_DATASHEET = {
    r"\bGB[23]00\b": 2500.0,
    r"\bB[23]00\b": 2250.0,
    r"\bH[12]00 NVL\b": 835.5,
    r"\bH100 PCIe\b": 756.0,
    r"\b(H100|H200|GH200|H800)\b": 989.0,
    r"\bH20\b": 148.0,
    r"\b(A100|A800)\b": 312.0,
    r"\bA30\b": 165.0,
    r"\bA40\b": 149.7,
    r"\bA10G\b": 70.0,
    r"\bA10\b": 125.0,
    r"\bL40S\b": 362.0,
    r"\bL40\b": 181.0,
    r"\bL4\b": 121.0,
    r"\bRTX 6000 Ada\b": 364.0,
    r"\bRTX A6000\b": 154.8,
    r"\bRTX 5090$": 209.5,
    r"\bRTX 4090$": 165.2,
    r"\bRTX 3090$": 71.0,
    r"\bV100-PCIE": 112.0,
    r"\bV100\b": 125.0,
    r"\bT4\b": 65.0,
}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of dense bf16 matrix products in the datasheet of a GPU, named as torch.cuda.get_device_name does.

    This is the denominator of MFU whatever the precision of the run. None for a GPU that is not listed and for a
    slice of one (MIG), of which the datasheet says nothing: measure_matmul_flops gives a denominator there.
    """
    if "MIG" in device_name:
        return None
    for pattern, tera in _DATASHEET.items():
        if re.search(pattern, device_name):
            return tera * 1e12
    return None


def measure_matmul_flops(device: Any, dtype: Any, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on this device, the best of some rounds: MFU's denominator on a CPU.

    Args:
        device: torch.device. dtype: torch.dtype of both factors.
        seconds: how long to measure; the warm-up comes on top.
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    size, rounds = (8192, 10) if on_gpu else (1024, 1)
    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))

    def time_rounds() -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    time_rounds()
    best, end = time_rounds(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, time_rounds())
    return 2 * size**3 * rounds / best


def flops_per_step(config: TrainConfig) -> int:
    """`model_flops_per_step` of the whole batch, every sequence full and tokens seeing all of theirs."""
    tokens = config.train_batch_size * config.max_seq_length
    masked = config.train_batch_size * _masked_per_sequence(config)
    return model_flops_per_step(config.model, tokens, masked, tokens * config.max_seq_length)


def estimate_memory(config: TrainConfig, micro_batch_size: int, num_processes: int = 1) -> dict[str, int]:
    """Bytes a device needs at the peak of a step, by what they are for, and their "total".

    For n parameters, all in fp32, and N processes (of which one alone shards nothing):

        sharding    parameters       gradients        optimizer
        none        4 n              4 n              8 n, the moments
        optimizer   4 n              4 n + 8 n / N    12 n / N, with the masters; the gradients of a process's pieces are
                                                      kept as they arrive and as the update rule wants them
        full        4 n / N + 4 g    8 n / N + 4 g    12 n / N; g is what FSDP2 holds whole at a time: embeddings, head,
                                                      and two layers, one at work and one on its way

    - parameters also hold 2 n for the copy in which half precision computes, which is whole in every mode; with
      gradient_checkpointing it is that of embeddings, head and one layer
    - activations: for each token and layer the input, q, k, v, the attention's output, both sums before LayerNorm and
      the LayerNorm between them (8 d numbers), and the MLP before and after GELU (2 f numbers); with
      gradient_checkpointing the input of each layer, and one layer at a time. No matrix of attention, and logits for
      4096 masked tokens at once at most.

    An estimate to choose a micro-batch by: allocator, libraries and workspaces come on top, and the last layer, which
    computes masked rows only, is counted in full. Buffers in which weights arrive when activations are gone do not count.
    """
    model = config.model
    d, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    count, layer_count = num_parameters(model), num_layer_parameters(model)
    outside = count - layers * layer_count  # embeddings and head
    part = -(-count // num_processes)
    if num_processes == 1 or config.sharding == "none":
        parameters, gradients, optimizer = 4 * count, 4 * count, 8 * count
    elif config.sharding == "optimizer":
        parameters, gradients, optimizer = 4 * count, 4 * count + 8 * part, 12 * part
    else:
        whole = outside + min(layers, 2) * layer_count
        parameters, gradients, optimizer = 4 * part + 4 * whole, 8 * part + 4 * whole, 12 * part

    width = 4 if config.precision == "fp32" else 2
    if width == 2:
        parameters += 2 * (outside + (1 if config.gradient_checkpointing else layers) * layer_count)
    tokens = micro_batch_size * config.max_seq_length
    masked = micro_batch_size * _masked_per_sequence(config)
    layer = (8 * d + 2 * f) * tokens * width
    kept = layers * d * tokens * width + layer if config.gradient_checkpointing else layers * layer
    head = 3 * d * masked * width + min(masked, 4096) * _vocabulary(model) * 4
    parts = {
        "parameters": parameters, "gradients": gradients, "optimizer": optimizer, "activations": kept + head
    }  # fmt: skip
    return parts | {"total": sum(parts.values())}


def _masked_per_sequence(config: TrainConfig) -> int:
    return round(config.mlm_probability * (config.max_seq_length - 2))  # <s> and </s> are never masked


class MetricsWriter:
    """metrics.jsonl, one JSON object a line, and TensorBoard's files where it is installed.

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
        """Write out what is pending and close the files."""
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
    ("throughput/tokens_per_second", "tokens/s ", "{:,.0f}", 1.0),
    ("throughput/mfu", "MFU ", "{:.1f}%", 100.0),
)


def format_line(metrics: Mapping[str, float], seconds_left: float | None) -> str:
    """Loss, learning rate, gradient norm, tokens/s, MFU, as far as they are given, and the time left."""
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
    """A line on stdout, or on another stream; where nobody reads any more, this one and the later ones go nowhere."""
    stream = sys.stdout if file is None else file
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # what is buffered goes there too, at the latest at exit
        os.close(nowhere)


class Progress:
    """The progress line: one that moves on a terminal, a plain one an update elsewhere.

    Args:
        total_steps: of the whole run. first_step: steps done before this process began.
        stream: where to; stderr if None, so that results on stdout can be piped.
    """

    def __init__(self, total_steps: int, first_step: int = 0, stream: TextIO | None = None):
        self.total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._reference = (first_step, time.monotonic())
        self._updates = 0
        self._bar: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that so many steps are done, with the metrics of the last interval."""
        line = format_line(metrics, self._estimate_seconds_left(step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
        else:
            print_line(f"step {step}/{self.total_steps}  {line}", self._stream)

    def _estimate_seconds_left(self, step: int) -> float | None:
        """At the mean speed since the first update, which leaves out compiling; before the second, since the start."""
        now = time.monotonic()
        reference_step, reference_time = self._reference
        self._updates += 1
        if self._updates == 1:
            self._reference = (step, now)
        if step <= reference_step:
            return None
        return (self.total_steps - step) * (now - reference_time) / (step - reference_step)

    def print(self, text: str) -> None:
        """A line of text that stays, above the moving one."""
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


# Reasons for a lower clock that cost speed, from nvml.h: software power cap, hardware slowdown, thermal slowdown in
# software and in hardware, power brake.
_THROTTLE_REASONS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class GpuMonitor:
    """Power, energy a token, temperature, clock and throttling of one GPU, through NVML (nvidia-ml-py).

    What a GPU does not tell (virtual ones tell little) is left out. Made by open_gpu_monitor.
    """

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle
        self._energy, self._time = self._ask("nvmlDeviceGetTotalEnergyConsumption"), time.monotonic()

    def _ask(self, query: str, *arguments: int) -> int | None:
        try:
            return getattr(self._nvml, query)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError):  # not supported by this GPU, or by this driver or library
            return None

    def sample(self, num_tokens: int) -> dict[str, float]:
        """Metrics since the last sample, in which this GPU processed so many tokens.

        gpu/power_watts is the mean over that time where the GPU counts its energy, else the power now.
        """
        metrics: dict[str, float] = {}
        energy, now = self._ask("nvmlDeviceGetTotalEnergyConsumption"), time.monotonic()  # millijoules
        power = self._ask("nvmlDeviceGetPowerUsage")  # milliwatts
        if energy is not None and self._energy is not None and now > self._time and energy >= self._energy:
            joules = (energy - self._energy) / 1000
            metrics["gpu/power_watts"] = joules / (now - self._time)
            if num_tokens > 0:
                metrics["gpu/joules_per_token"] = joules / num_tokens
        elif power is not None:
            metrics["gpu/power_watts"] = power / 1000
        self._energy, self._time = energy, now
        temperature = self._ask("nvmlDeviceGetTemperature", 0)  # NVML_TEMPERATURE_GPU
        if temperature is not None:
            metrics["gpu/temperature_celsius"] = float(temperature)
        clock = self._ask("nvmlDeviceGetClockInfo", 1)  # NVML_CLOCK_SM
        if clock is not None:
            metrics["gpu/sm_clock_mhz"] = float(clock)
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if reasons is not None:
            metrics["gpu/throttled"] = float(bool(reasons & _THROTTLE_REASONS))
        return metrics

    def close(self) -> None:
        """Release NVML."""
        self._nvml.nvmlShutdown()


def open_gpu_monitor(uuid: str) -> GpuMonitor | None:
    """The monitor of a GPU; None where nvidia-ml-py, the driver or the GPU does not answer.

    Args:
        uuid: str(torch.cuda.get_device_properties(device).uuid). NVML counts GPUs otherwise than CUDA does, which
            CUDA_VISIBLE_DEVICES reorders.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return GpuMonitor(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except pynvml.NVMLError:
        return None
