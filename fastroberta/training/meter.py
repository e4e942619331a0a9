"""Sums over a logging interval: on the device what only the device knows, on the host everything else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import TrainConfig
from ..costs import peak_flops, training_flops
from ..errors import NonFiniteError
from ..gpu_monitor import open_gpu_monitor
from ..optim import LossScaler, learning_rate
from ..parallel.processes import Processes
from ..precision import measure_matmul_flops
from .resume import advise_on_divergence


class Meter:
    """Loss, gradient norm and throughput since the last reading.

    The first step of a process compiles kernels and allocates memory. Throughput leaves it out, unless it is the only step
    of its interval.

    Args:
        compute_dtype: of matrix products, to measure the peak where no datasheet gives it.
        scaler: of the loss; with fp16, a gradient that overflows now and then is normal.

    Attributes:
        warmed_up: when the first step ended, by time.monotonic(); None before.
    """

    def __init__(self, config: TrainConfig, processes: Processes, compute_dtype: torch.dtype, scaler: LossScaler):
        self._config, self._processes, self._scaler = config, processes, scaler
        self._peak, self._monitor = None, None
        if processes.device.type == "cuda":
            properties = torch.cuda.get_device_properties(processes.device)
            self._peak = peak_flops(properties.name)
            self._monitor = open_gpu_monitor(str(properties.uuid))
        if self._peak is None:
            self._peak = measure_matmul_flops(processes.device, compute_dtype)
        self.warmed_up: float | None = None
        self._reset()

    def _reset(self) -> None:
        device = self._processes.device
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)
        self._norm = self._skipped = self._finite_steps = torch.zeros((), device=device)
        self._is_finite = torch.ones((), device=device)  # 0 from the first step that is not
        self._steps = self._tokens = self._flops = 0
        self._first_step = (0.0, 0, 0)  # seconds, tokens and FLOPs of the first step, if it lies in this interval
        self._started = time.monotonic()

    def add(self, totals: Tensor, norm: Tensor, found_inf: Tensor, sizes: list[tuple[int, int]]) -> None:
        """Add a step.

        Args:
            totals: fp64 (3,), on the device: sum of the losses, correct tokens, masked tokens.
            norm: of the gradient. found_inf: 1.0 if the gradient is not finite. Both scalars on the device.
            sizes: number of tokens and sum of squared sequence lengths, for each micro-batch of this process.
        """
        for tokens, squares in sizes:
            self._tokens += tokens
            masked = int(tokens * self._config.mlm_probability)
            self._flops += training_flops(self._config, tokens, masked, squares)
        self._steps += 1
        self._totals = self._totals + totals
        self._norm = norm
        self._skipped = self._skipped + found_inf
        self._is_finite = self._is_finite * (1 - found_inf)
        self._finite_steps = self._finite_steps + self._is_finite
        if self.warmed_up is None:
            self.warmed_up = time.monotonic()
            self._first_step = (self.warmed_up - self._started, self._tokens, self._flops)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of a block, such as an evaluation, out of the throughput."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began

    def read(self, step: int) -> dict[str, float]:
        """The metrics since the last reading, after `step` steps of the run. Only here does the host wait for the device.

        Raises:
            NonFiniteError: a loss or a gradient is not finite; in fp16, gradients may overflow now and then.
        """
        config = self._config
        loss, correct, masked = self._totals.tolist()
        skipped = int(self._skipped)
        seconds_left_out, tokens_left_out, flops_left_out = self._first_step if self._steps > 1 else (0.0, 0, 0)
        seconds = time.monotonic() - self._started - seconds_left_out
        counts = [self._tokens - tokens_left_out, self._flops - flops_left_out]
        counted = torch.tensor(counts, dtype=torch.float64, device=self._processes.device)
        tokens, flops = self._processes.add_up(counted).tolist()
        overflow_is_normal = config.precision == "fp16" and float(self._scaler.scale) >= 1.0
        if skipped and not overflow_is_normal:
            first = step - self._steps + 1
            found = first + int(self._finite_steps)
            raise NonFiniteError(
                f"step {found}: loss or gradient not finite, in {skipped} of steps {first} to {step}; none of it reached "
                f"the weights; {advise_on_divergence(config, found)}"
            )
        assert self._peak is not None
        metrics = {
            "train/loss": loss / max(masked, 1),
            "train/accuracy": correct / max(masked, 1),
            "train/learning_rate": learning_rate(max(step - 1, 0), config),
            "train/grad_norm": float(self._norm),
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/mfu": flops / seconds / (self._peak * self._processes.size),
        }
        if self._scaler.enabled:
            metrics |= {"train/loss_scale": float(self._scaler.scale), "train/skipped_steps": float(skipped)}
        if self._monitor is not None:
            metrics |= self._monitor.sample(self._tokens)
        self._reset()
        return metrics
