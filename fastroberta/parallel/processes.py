"""The processes of one run: where each computes, what they tell each other, and which of them holds the others up.

torchrun starts the processes and gives each its rank in the environment. Without it a run is one process, and nothing here
communicates. Tensors travel over NCCL between GPUs and over gloo between CPUs; who is alive and how far it is, over
torchrun's store.
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
    """The device that `auto`, `cpu` or `cuda` stands for, for the process of this rank on its machine.

    Raises:
        ConfigurationError: CUDA is asked for and there is none, or there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise ConfigurationError("device: cuda is asked for, PyTorch sees no GPU; take --device cpu or auto")
    if name == "cpu" or not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigurationError(
            f"device: process {local_rank} of this machine has no GPU, there are {count}; start torchrun with "
            f"--nproc_per_node {count}"
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensors of a CPU, for the rest of the process.

    It gives large blocks back to the system otherwise, which clears every page of them anew at each step: 100,000 pages
    of roberta-base's, 4 to 10% of the time. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


class Processes:
    """The processes of a run, seen from one of them; a single process is a run of size 1.

    Attributes:
        rank, size: of this process, and how many there are. device: where this one computes.

    Args:
        hosts: for what hosts tell each other, past the work that their GPUs have yet to do.
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
        """Whether this process is the one that speaks, and writes files."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; the same bits everywhere."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def collect(self, value: Any) -> list[Any]:
        """A small picklable value of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def find_ranks(self, is_one: bool) -> list[int]:
        """The ranks of the processes for which it is so. Here hosts wait for each other, but not for their devices."""
        found = torch.zeros(self.size, dtype=torch.uint8)
        found[self.rank] = is_one
        if self.size > 1:
            dist.all_reduce(found, group=self._hosts)
        return found.nonzero().flatten().tolist()

    def wait_for_all(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            dist.barrier(group=self._hosts)

    def note_progress(self, where: str) -> None:
        """Tell the watchdog that this process lives, and what it does next."""
        if self._watchdog is not None:
            self._watchdog.note(where)

    def note_reduction(self) -> None:
        """Tell the watchdog that this process has sent its gradients, and waits for the others'."""
        self.note_progress("the reduction of gradients")

    def be_patient(self) -> None:
        """What comes next may take any time: until the next progress the watchdog's clock stands still."""
        if self._watchdog is not None:
            self._watchdog.pause()

    def compare(self, facts: dict[str, Any], what_to_do: str) -> None:
        """Make sure that all processes have the same facts.

        Raises:
            ConfigurationError: in every process, with the first one that differs from rank 0 and in what.
        """
        everyone = self.collect(facts)
        for rank, other in enumerate(everyone):
            for name in sorted(everyone[0].keys() | other.keys()):
                here, there = everyone[0].get(name), other.get(name)
                if there != here:
                    raise ConfigurationError(f"rank {rank}: {name} is {there!r}, and {here!r} on rank 0; {what_to_do}")

    def check_replicas(self, tensors: list[Tensor], step: int) -> None:
        """Hold the weights of all processes, which should be the same bits, against each other.

        Raises:
            ProcessError: in every process, with the ranks that differ from most.
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
                f"step {step}: the weights of rank {', '.join(map(str, odd))} are not those of the other processes, so "
                "one of these machines computes wrongly; continue from the last checkpoint without it"
            )

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Where communication fails because a process has died, say which.

        Raises:
            ProcessError: in place of what the library for communication raised.
        """
        try:
            yield
        except RuntimeError as error:
            if self._watchdog is None or isinstance(error, torch.OutOfMemoryError):
                raise
            self._watchdog.pause()  # this process stands still on purpose
            dead = self._watchdog.find_dead()
            if not dead:
                raise
            raise ProcessError(
                f"{dead}: has died, see its own last words or torchrun's report; started again, the run continues from "
                "its last checkpoint"
            ) from error

    def leave(self) -> None:
        """End communication, when all is done."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self.size > 1:
            dist.destroy_process_group()


def add_bits(tensors: list[Tensor]) -> Tensor:
    """A number (int64 scalar tensor) that differs where one of these fp32 tensors does."""
    sums = [tensor.view(torch.int32).sum(dtype=torch.int64) * (2 * i + 1) for i, tensor in enumerate(tensors)]
    return torch.stack(sums).sum()


def join_processes(device: str, timeout: float) -> Processes:
    """Meet the other processes that torchrun started, if any.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout: seconds without progress after which a process ends itself, and says who held it up.
    Raises:
        ConfigurationError: no such device, or torchrun's environment is incomplete.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Processes(select_device(device))
    from torch.distributed.rendezvous import rendezvous

    here = select_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    # Later than the watchdog, which can say more.
    patience = datetime.timedelta(seconds=timeout + 60)
    try:
        store, rank, size = next(rendezvous("env://", timeout=patience))
    except (ValueError, dist.DistError) as error:
        raise ConfigurationError(
            f"WORLD_SIZE is {size}, but the processes do not meet ({error}); start them with torchrun"
        ) from error
    store.set_timeout(patience)
    store.set(f"device of {rank}", here.type)
    first = store.get("device of 0").decode()
    if first != here.type:
        raise ConfigurationError(
            f"rank {rank} computes on {here.type}, rank 0 on {first}; see that each machine's GPU works, or give --device"
        )
    if here.type == "cuda":
        torch.cuda.set_device(here)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, timeout=patience, device_id=here)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    # NCCL would end a process that waits for a long checkpoint. Made now: later torchrun, and the store, may be gone.
    hosts = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    return Processes(here, rank, size, Watchdog(store, rank, size, timeout), hosts)
