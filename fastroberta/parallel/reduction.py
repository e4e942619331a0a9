"""Reducing gradients while the backward that produces them is still running."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class OverlappedReduction:
    """Sends buckets of gradients during a backward: bucket i as soon as its gradients and all earlier buckets are ready.

    All processes send in the same order, whatever the order in which gradients become ready.

    Args:
        buckets: the parameters of each bucket.
        send: starts to reduce the bucket of a number, and returns the work to wait for.
        before_waiting: called when every bucket has been sent.
    """

    def __init__(
        self, buckets: list[list[nn.Parameter]], send: Callable[[int], Any], before_waiting: Callable[[], None]
    ):
        self._sizes = [len(bucket) for bucket in buckets]
        self._send, self._before_waiting = send, before_waiting
        self._is_on = False
        self._missing: list[int] = []
        self._works: list[Any] = []
        for index, bucket in enumerate(buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._note_ready, index))

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Around one backward; on leaving, all gradients are reduced.

        Out of memory in the block, the remaining buckets are sent all the same: the other processes wait for them.
        """
        self._missing, self._works = list(self._sizes), []
        self._is_on = True
        try:
            yield
        except torch.OutOfMemoryError:
            self._is_on = False
            self._finish()
            raise
        finally:
            self._is_on = False
        self._finish()

    def _finish(self) -> None:
        while len(self._works) < len(self._sizes):  # buckets with parameters that got no gradient
            self._works.append(self._send(len(self._works)))
        self._before_waiting()
        for work in self._works:
            work.wait()

    def _note_ready(self, index: int, _: Tensor) -> None:
        if not self._is_on:
            return
        self._missing[index] -= 1
        while len(self._works) < len(self._sizes) and not self._missing[len(self._works)]:
            self._works.append(self._send(len(self._works)))
