"""The GPU's sensors, through a stand-in for NVML."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from fastroberta.gpu_monitor import GpuMonitor, open_gpu_monitor
from fastroberta.precision import measure_matmul_flops


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
