"""Power, energy, temperature and clock of a GPU, through NVML."""

from __future__ import annotations

import time
from typing import Any

# Reasons for a lower clock that cost speed, from nvml.h: software power cap, hardware slowdown, thermal slowdown in
# software and in hardware, power brake.
_THROTTLE_REASONS = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class GpuMonitor:
    """Power, energy per token, temperature, clock and throttling of one GPU, through NVML (nvidia-ml-py).

    What a GPU does not report (virtual GPUs report little) is left out. Use `open_gpu_monitor`.
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
        """Metrics since the last sample, during which this GPU processed `num_tokens` tokens.

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
    """The monitor of a GPU; None if nvidia-ml-py is missing, or the driver or the GPU does not answer.

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
