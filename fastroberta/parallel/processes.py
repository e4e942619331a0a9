"""The processes of a run: the device of each, and how they exchange sums, facts and progress.

torchrun starts the processes and puts the rank of each into its environment. Without torchrun a run is a single process, and
nothing here communicates. Tensors travel over NCCL between GPUs and over gloo between CPUs; heartbeats and progress travel
over torchrun's store.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigurationError, ProcessError
from .watchdog import Watchdog


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means for the process with this rank on its machine.

    Raises:
        ConfigurationError: CUDA was requested but is not available, or there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise ConfigurationError("device: cuda was requested, but PyTorch sees no GPU; use --device cpu or auto")
    if name == "cpu" or not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigurationError(
            f"device: there is no GPU for process {local_rank} of this machine, which has {count}; start torchrun with "
            f"--nproc_per_node {count}"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensors on the CPU, until the process ends.

    By default it returns large blocks to the system, which then has to clear their pages again in every step: 100,000
    pages for roberta-base, 4 to 10% of the time. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


class Processes:
    """The processes of a run, as seen by one of them. A run without torchrun has size 1.

    Attributes:
        device: where this process computes. rank: of this process. size: the number of processes.

    Args:
        hosts: a gloo group, with which the hosts communicate without waiting for their GPUs.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        watchdog: Watchdog | None = None,
        hosts: dist.ProcessGroup | None = None,
    ):
        self.device, self.rank, self.size = device, rank, size
        self._watchdog, self._hosts = watchdog, hosts

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files for all."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place. All get the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; each must be small and can be pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def find_ranks(self, is_one: bool) -> list[int]:
        """The ranks that pass True. Hosts wait for each other here, but not for their devices."""
        found = torch.zeros(self.size, dtype=torch.uint8)
        found[self.rank] = is_one
        if self.size > 1:
            dist.all_reduce(found, group=self._hosts)
        return found.nonzero().flatten().tolist()

    def wait_for_all(self) -> None:
        """Wait until all processes have arrived here."""
        if self.size > 1:
            dist.barrier(group=self._hosts)

    def note_progress(self, where: str) -> None:
        """Tell the watchdog that this process has made progress, and what it does next."""
        if self._watchdog is not None:
            self._watchdog.note(where)

    def note_reduction(self) -> None:
        """Tell the watchdog that this process has sent its gradients and waits for the others."""
        self.note_progress("the reduction of gradients")

    def be_patient(self) -> None:
        """Stop the watchdog's clock until the next progress, because what follows may take any time."""
        if self._watchdog is not None:
            self._watchdog.pause()

    def compare(self, facts: dict[str, Any], what_to_do: str) -> None:
        """Check that all processes have the same facts.

        Raises:
            ConfigurationError: in every process; names the first rank that differs from rank 0, and the fact.
        """
        everyone = self.collect(facts)
        for rank, other in enumerate(everyone):
            for name in sorted(everyone[0].keys() | other.keys()):
                here, there = everyone[0].get(name), other.get(name)
                if there != here:
                    raise ConfigurationError(f"rank {rank}: {name} is {there!r}, but {here!r} on rank 0; {what_to_do}")

    def check_replicas(self, tensors: list[Tensor], step: int) -> None:
        """Check that the weights of all processes are the same bits.

        Raises:
            ProcessError: in every process; names the ranks that differ from the majority.
        """
        if self.size == 1:
            return
        found = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        found[self.rank] = add_bits(tensors)
        values = self.add_up(found).tolist()
        usual = max(values, key=values.count)
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            raise ProcessError(
                f"step {step}: the weights of rank {', '.join(map(str, odd))} differ from those of the other processes, so "
                "that machine computes wrong results; continue from the last checkpoint without it"
            )

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """When communication fails because a process has died, say which one.

        Raises:
            ProcessError: in place of the communication library's error.
        """
        try:
            yield
        except RuntimeError as error:
            if self._watchdog is None or isinstance(error, torch.OutOfMemoryError):
                raise
            self._watchdog.pause()  # finding out takes seconds without progress
            dead = self._watchdog.find_dead()
            if not dead:
                raise
            raise ProcessError(
                f"{dead}: has died, see its last messages or torchrun's report; when restarted, the run continues from its "
                "last checkpoint"
            ) from error

    def leave(self) -> None:
        """End all communication."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def add_bits(tensors: list[Tensor]) -> Tensor:
    """A checksum (int64 scalar tensor) of fp32 tensors: it changes when any one of them does."""
    sums = [tensor.view(torch.int32).sum(dtype=torch.int64) * (2 * i + 1) for i, tensor in enumerate(tensors)]
    return torch.stack(sums).sum()


def join_processes(device: str, timeout: float) -> Processes:
    """Connect to the other processes that torchrun started, if any.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout: seconds without progress after which a process exits and says which one it was waiting for.
    Raises:
        ConfigurationError: the device is missing, or torchrun's environment is incomplete.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Processes(select_device(device))
    from torch.distributed.rendezvous import rendezvous

    here = select_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    # Longer than the watchdog's, which can say more.
    patience = datetime.timedelta(seconds=timeout + 60)
    try:
        store, rank, size = next(rendezvous("env://", timeout=patience))
    except (ValueError, dist.DistError) as error:
        raise ConfigurationError(
            f"WORLD_SIZE is {size}, but the processes cannot connect ({error}); start them with torchrun"
        ) from error
    store.set_timeout(patience)
    store.set(f"device of {rank}", here.type)
    first = store.get("device of 0").decode()
    if first != here.type:
        raise ConfigurationError(
            f"rank {rank} computes on {here.type}, but rank 0 on {first}; check each machine's GPUs, or give --device"
        )
    if here.type == "cuda":
        torch.cuda.set_device(here)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, timeout=patience, device_id=here)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    # NCCL would abort a process that waits for a long checkpoint. Created now: torchrun and its store may be gone later.
    hosts = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    return Processes(here, rank, size, Watchdog(store, rank, size, timeout), hosts)
