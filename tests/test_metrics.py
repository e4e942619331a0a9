"""Metrics: FLOPs, sizes, files, the progress line, and the GPU's sensors through a stand-in for NVML."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import types

import pytest
import torch

from fastroberta import metrics
from fastroberta.config import ModelConfig, TrainConfig
from fastroberta.errors import CheckpointError
from fastroberta.metrics import (
    GpuMonitor,
    MetricsWriter,
    Progress,
    estimate_memory,
    flops_per_step,
    format_seconds,
    measure_matmul_flops,
    model_flops_per_step,
    num_layer_parameters,
    num_parameters,
    open_gpu_monitor,
    peak_flops,
)

BASE = ModelConfig(vocab_size=50265)
LARGE = ModelConfig(
    vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


# Operations and sizes.


@pytest.mark.parametrize(("model", "mega"), [(BASE, 601.5), (LARGE, 2010.2)])
def test_flops_a_token_at_512_and_15_percent(model, mega):
    n = 512 * 1000
    assert model_flops_per_step(model, n, n * 15 // 100, n * 512) / n / 1e6 == pytest.approx(mega, abs=0.05)


def test_flops_are_those_that_pytorch_counts():
    """PyTorch counts every matrix product of a toy encoder with the same shapes, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    d, f, length, masked, v = 32, 80, 16, 5, 50  # f is not 4 d on purpose
    weights = [torch.randn(shape, requires_grad=True) for shape in ((d, 3 * d), (d, d), (d, f), (f, d), (d, d), (d, v))]
    x = torch.randn(length, d, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        q, k, value = (x @ weights[0]).split(d, dim=1)
        hidden = (q @ k.T).softmax(1) @ value @ weights[1] @ weights[2] @ weights[3]
        (hidden[:masked] @ weights[4] @ weights[5]).sum().backward()
    model = ModelConfig(vocab_size=v, hidden_size=d, num_hidden_layers=1, num_attention_heads=1, intermediate_size=f)
    assert counter.get_total_flops() == model_flops_per_step(model, length, masked, length**2)


def test_number_of_parameters():
    assert num_parameters(BASE) == 124_697_433  # measured on transformers' model
    assert num_parameters(LARGE) == 355_412_057
    with pytest.raises(ValueError, match="vocab_size is not set"):
        num_parameters(ModelConfig())


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another chip under a similar name
        ("NVIDIA H200 MIG 1g.18gb", None),  # a slice
        ("NVIDIA A1000", None),  # not the A100
        ("cpu", None),
    ],
)
def test_peak_flops(name, tera):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_measured_matmul_rate_is_what_a_matmul_reaches():
    rate = measure_matmul_flops("cpu", torch.float32, seconds=0.1)
    assert 1e8 < rate < 1e14


def test_memory_estimate():
    config = TrainConfig(model=BASE, precision="fp32")
    parts = estimate_memory(config, 4)
    assert parts["parameters"] + parts["gradients"] + parts["optimizer"] == 16 * num_parameters(BASE)
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    per_layer = (8 * 768 + 2 * 3072) * 4 * 512 * 4
    assert 12 * per_layer < parts["activations"] < 1.1 * 12 * per_layer  # the head, logits included, is the rest
    config.precision = "bf16"
    half = estimate_memory(config, 4)
    assert half["parameters"] == 6 * num_parameters(BASE)
    assert half["activations"] == pytest.approx(parts["activations"] / 2, rel=0.1)
    assert estimate_memory(config, 8)["parameters"] == half["parameters"]
    config.gradient_checkpointing = True
    assert estimate_memory(config, 4)["activations"] < half["activations"] / 3
    copy = half["parameters"] - estimate_memory(config, 4)["parameters"]
    assert copy == 2 * 11 * num_layer_parameters(BASE)  # one layer's at a time is left


@pytest.mark.parametrize(
    ("sharding", "replicated", "divided"), [("none", 16, 0), ("optimizer", 8, 20), ("full", 0, 24)]
)
def test_memory_estimate_of_several_processes(sharding, replicated, divided):
    """Bytes a parameter, as tests/test_plan.py finds them in processes of a model."""
    config = TrainConfig(model=BASE, precision="fp32", sharding=sharding)
    n, layer = num_parameters(BASE), num_layer_parameters(BASE)
    for num_processes in (2, 8, 128):
        parts = estimate_memory(config, 4, num_processes)
        kept = parts["total"] - parts["activations"]
        if sharding == "full":  # whole: embeddings, head and two layers, weights and gradients
            kept -= 8 * (n - 10 * layer)
        assert kept == pytest.approx((replicated + divided / num_processes) * n, abs=32)
        assert parts["activations"] == estimate_memory(config, 4)["activations"]
    assert estimate_memory(config, 4)["total"] == estimate_memory(TrainConfig(model=BASE, precision="fp32"), 4)["total"]


def test_flops_of_a_step():
    config = TrainConfig(model=BASE)  # 8192 sequences of 512 tokens
    assert flops_per_step(config) == pytest.approx(8192 * 512 * 601.5e6, rel=0.01)


# Files.


def read_lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_json_with_null_for_what_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(10, {"train/loss": 2.5, "train/grad_norm": math.nan, "train/accuracy": -math.inf})
        (line,) = read_lines(tmp_path)  # flushed before it is closed
    assert line.pop("time") > 1.7e9
    assert line == {"step": 10, "train/loss": 2.5, "train/grad_norm": None, "train/accuracy": None}


def test_resuming_drops_later_lines(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (0, 10, 20, 30):
            writer.write(step, {"train/loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "train/lo')  # the process was killed while it wrote
    with MetricsWriter(tmp_path, resumed_step=20, tensorboard=False) as writer:
        writer.write(30, {"train/loss": 2.0})
    assert [(line["step"], line["train/loss"]) for line in read_lines(tmp_path)] == [(0, 1), (10, 1), (20, 1), (30, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_is_atomic(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(10, {"train/loss": 1.0})
        writer.write(20, {"train/loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(metrics.os, "replace", crash)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be written \(disk full\); make room"):
        MetricsWriter(tmp_path, resumed_step=10, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_new_run_starts_an_empty_file(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(0, {"eval/loss": 1.0})
    assert len(read_lines(tmp_path)) == 1


def test_tensorboard_holds_the_same_numbers_and_no_step_twice(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": float(step)})
    with MetricsWriter(tmp_path, resumed_step=2) as writer:
        writer.write(3, {"train/loss": 30.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30)]


def test_without_tensorboard_the_lines_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert len(read_lines(tmp_path)) == 1
    assert not (tmp_path / "tensorboard").exists()


# The progress line.


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "monotonic", clock)
    return clock


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


# The GPU.


class StandIn(types.ModuleType):
    """pynvml with one GPU; what is in `unsupported` raises, as virtual GPUs do."""

    class NVMLError(Exception):
        pass

    def __init__(self, unsupported: tuple[str, ...] = ()):
        super().__init__("pynvml")
        self.values = {
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,  # mJ
            "nvmlDeviceGetPowerUsage": 650_000,  # mW
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1,  # idle, which is none
        }
        self.is_open = False
        for name in self.values:
            setattr(self, name, self.answer(name, name in unsupported))

    def answer(self, name: str, unsupported: bool):
        def query(handle, *_):
            assert handle == "handle"
            if unsupported:
                raise self.NVMLError("Not Supported")
            return self.values[name]

        return query

    def nvmlInit(self):
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1234":
            raise self.NVMLError("Not Found")
        return "handle"


def test_gpu_monitor(clock, monkeypatch):
    nvml = StandIn()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monitor = open_gpu_monitor("1234")
    assert isinstance(monitor, GpuMonitor)
    clock.now += 10
    nvml.values["nvmlDeviceGetTotalEnergyConsumption"] += 7_000_000
    assert monitor.sample(2_000_000) == {
        "gpu/power_watts": 700.0,
        "gpu/joules_per_token": 0.0035,
        "gpu/temperature_celsius": 61.0,
        "gpu/sm_clock_mhz": 1755.0,
        "gpu/throttled": 0.0,
    }
    clock.now += 1
    nvml.values["nvmlDeviceGetTotalEnergyConsumption"] += 300_000
    nvml.values["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x5  # idle and power cap
    sample = monitor.sample(100)
    assert sample["gpu/power_watts"] == 300.0  # since the last sample
    assert sample["gpu/throttled"] == 1.0
    clock.now += 1
    assert "gpu/joules_per_token" not in monitor.sample(0)
    monitor.close()
    assert not nvml.is_open


def test_gpu_monitor_leaves_out_what_a_gpu_does_not_tell(clock, monkeypatch):
    unsupported = ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCurrentClocksThrottleReasons")
    nvml = StandIn(unsupported)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    del nvml.nvmlDeviceGetClockInfo  # an old library
    clock.now += 10
    monitor = open_gpu_monitor("1234")
    assert monitor is not None
    assert monitor.sample(10) == {"gpu/power_watts": 650.0, "gpu/temperature_celsius": 61.0}


def test_no_gpu_monitor_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", StandIn())
    assert open_gpu_monitor("of another machine") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpu_monitor("1234") is None


@pytest.mark.gpu
def test_gpu_monitor_on_the_real_thing():
    pytest.importorskip("pynvml")
    monitor = open_gpu_monitor(str(torch.cuda.get_device_properties(0).uuid))
    if monitor is None:
        pytest.skip("this GPU does not answer NVML (a slice, or a container without it)")
    measure_matmul_flops("cuda", torch.bfloat16, seconds=1.0)
    sample = monitor.sample(1000)
    monitor.close()
    assert 10 < sample["gpu/power_watts"] < 3000
    assert 10 < sample["gpu/temperature_celsius"] < 110


@pytest.mark.gpu
def test_measured_rate_is_below_the_datasheet():
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        pytest.skip("this GPU is not in the table")
    assert 0.2 * peak < measure_matmul_flops("cuda", torch.bfloat16) < 1.05 * peak


def test_import_is_light():
    code = "import sys, fastroberta.metrics; print({'torch', 'rich', 'tensorboard', 'pynvml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
