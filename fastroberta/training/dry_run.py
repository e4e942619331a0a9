"""`--dry-run`: describe a run, and measure two small steps of it."""

from __future__ import annotations

import dataclasses
import time

import torch

from ..config import BatchRampConfig
from ..costs import estimate_memory
from ..learning_rates import advise_on_learning_rate
from ..log import format_seconds
from .micro_batches import MicroBatches
from .report import say
from .trainer import Trainer


def rehearse(trainer: Trainer) -> None:
    """Describe the run and take two small steps of it. Nothing is written."""
    trainer.describe()
    config, processes, whole = trainer.config, trainer.processes, trainer.batches
    for name, size in estimate_memory(config, whole.size, processes.size).items():
        say(processes, f"  memory, {name}: {size / 2**20:,.0f} MiB (estimate)")
    say(processes, advise_on_learning_rate(config))
    # One micro-batch is enough to measure; a step of thousands of sequences could take hours on a CPU.
    samples = processes.size * whole.size
    say(processes, f"measuring two steps of {samples:,} sequences in {config.precision} on {processes.device} ...")
    small = dataclasses.replace(config, train_batch_size=samples, batch_ramp=BatchRampConfig(), max_steps=2)
    trainer.batches = MicroBatches(small, trainer.blocks, processes)
    trainer.step = 0  # also where the run is finished
    trainer.train_step()  # the first is slower than those that follow
    trainer.step = 1
    meter, started = trainer.make_meter(), time.monotonic()
    trainer.train_step(meter)
    loss = meter.read(2)["train/loss"]
    seconds_a_sample = (time.monotonic() - started) / samples
    if trainer.device.type == "cuda":
        say(processes, f"  memory, measured: {torch.cuda.max_memory_allocated(trainer.device) / 2**20:,.0f} MiB")
    one_step = seconds_a_sample * config.train_batch_size
    all_steps = seconds_a_sample * whole.num_sequences_until(config.max_steps)
    say(
        processes,
        f"  one micro-batch done: loss {loss:.3f}; a step takes about {format_seconds(one_step)}, all of them "
        f"{format_seconds(all_steps)}",
    )
