"""The micro-batches of a run: how many sequences a device holds at once, and which ones come next."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config import TrainConfig
from ..costs import choose_micro_batch_size
from ..data import Batch, Blocks, move_ahead, training_batches
from ..errors import DeviceMemoryError
from ..optim import BatchSchedule
from ..parallel.processes import Processes

CPU_TOKENS = 4096  # more tokens at once do not make a CPU faster


class MicroBatches:
    """This process's share of every step, cut into micro-batches of one size.

    Args:
        start: see `BatchSchedule`.
    Attributes:
        size: sequences of a micro-batch. It starts as configured, or with `auto` at the largest size that should fit,
            and is halved when memory runs out.
    """

    def __init__(self, config: TrainConfig, blocks: Blocks, processes: Processes, start: tuple[int, int] = (0, 0)):
        self._config, self._blocks, self._processes = config, blocks, processes
        self._schedule = BatchSchedule(config, start)
        # A micro-batch that does not fit can be halved if its size was left open. Not under FSDP2: the other processes
        # would wait for this one in every layer.
        uses_fsdp = config.sharding == "full" and (processes.size > 1 or config.cpu_offload)
        self.may_halve = config.micro_batch_size == "auto" and not uses_fsdp
        self.size = self._choose_size()
        self._next_step = -1
        self._batches: Iterator[Batch] = iter(())

    def _choose_size(self) -> int:
        config, size, device = self._config, self._processes.size, self._processes.device
        if config.micro_batch_size != "auto":
            return config.micro_batch_size
        share = config.smallest_batch_size // size
        if device.type == "cpu":
            return max(one for one in _divisors(share) if one == 1 or one * config.max_seq_length <= CPU_TOKENS)
        # What is free, and what this process already holds for weights and gradients.
        budget = 0.9 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device))
        return min(self._processes.collect(choose_micro_batch_size(config, share, budget, size)))

    def num_sequences(self, step: int) -> int:
        """Sequences of a step, counted from 0, over all processes."""
        return len(self._schedule.samples(step))

    def num_sequences_until(self, step: int) -> int:
        """Sequences of all steps before this one."""
        return self._schedule.samples(step).start

    def of_step(self, step: int) -> Iterator[tuple[Batch, bool]]:
        """The micro-batches of a step, on this process's device, each with whether it is the step's last.

        The next one is read and sent to the device while the current one is in use, across steps as well, as long as
        steps are asked for in order.
        """
        if step != self._next_step:
            batches = training_batches(
                self._blocks,
                self._list_first_samples(step),
                self.size,
                seed=self._config.seed,
                static_masking=self._config.masking == "static",
            )
            self._batches = move_ahead(batches, self._processes.device)
        self._next_step = step + 1
        count = self.num_sequences(step) // (self._processes.size * self.size)
        for index in range(count):
            with torch.profiler.record_function("data"):
                batch = next(self._batches)
            yield batch, index == count - 1

    def _list_first_samples(self, step: int) -> Iterator[int]:
        """Where each of this process's micro-batches begins, in training order, from a step to the last."""
        for later in range(step, self._config.max_steps):
            samples = self._schedule.samples(later)
            share = len(samples) // self._processes.size
            first = samples.start + self._processes.rank * share
            yield from range(first, first + share, self.size)

    def halve(self, step: int, ranks: list[int]) -> str:
        """Use half as many sequences at once from this step on, because these ranks ran out of memory.

        Returns:
            the line that says so.
        Raises:
            DeviceMemoryError: a single sequence is too much already.
        """
        where = "" if self._processes.size == 1 else f" on rank {', '.join(map(str, ranks))}"
        if self.size == 1:
            raise DeviceMemoryError(
                f"step {step + 1}: out of memory{where} with a single sequence; the same command with "
                "--gradient_checkpointing continues from the last checkpoint"
            )
        batch = self._config.smallest_batch_size // self._processes.size
        self.size = max(one for one in _divisors(batch) if one <= self.size // 2)
        self._next_step = -1  # what was read ahead has the old size
        return f"out of memory{where}: continuing with {self.size} sequences at once"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
