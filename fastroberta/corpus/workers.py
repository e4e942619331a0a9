"""Who processes the chunks: this process, a pool of processes, or the workers of a Dask cluster.

Each is a `concurrent.futures` executor. One process reads the corpus and cuts it; workers get the text with the task
and write chunk files, so a task that is repeated because its worker was lost writes the same bytes again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError, DeviceMemoryError, ProcessError
from ..log import Progress
from .chunks import ChunkSettings, process_chunk
from .read import Chunk

_SECONDS_BETWEEN_LINES = 10


def process_chunks(
    chunks: Iterable[Chunk],
    work: Path,
    settings: ChunkSettings,
    *,
    workers: int,
    cluster: str | None,
    total_bytes: int,
    check: Callable[[], None],
) -> list[Path]:
    """Write the chunk files that `work` lacks.

    Args:
        workers: processes, without a cluster. cluster: as prepare's option.
        total_bytes: of all input files, for the progress line.
        check: called often; it raises to stop.
    Returns:
        All chunk files, in order.
    Raises:
        ConfigurationError: no such cluster. DeviceMemoryError, ProcessError: workers were lost.
        DataError: bad input, or a disk that not all workers share.
    """
    # Listed once: a network disk would remember for a while that a file it was asked for is missing.
    existing = {path.name for path in work.glob("*.npz")}
    paths: list[Path] = []
    pending: deque[tuple[Chunk, concurrent.futures.Future[dict[str, int]]]] = deque()
    total = max(1, round(total_bytes / 1e6))
    read_bytes = 0
    done: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        executor, count_workers = stack.enter_context(_start_workers(workers, cluster))
        progress: Progress | None = None

        def finish_oldest() -> None:
            nonlocal read_bytes
            chunk, future = pending.popleft()  # in order, so that the first of several faults is reported
            while not future.done():
                check()
                concurrent.futures.wait([future], timeout=0.5)
            done.update(future.result())
            read_bytes += chunk.input_bytes
            seconds = max(time.monotonic() - start, 1e-9)
            speed = {"megabytes": done["bytes"] / seconds / 1e6, "tokens": done["tokens"] / seconds}
            assert progress is not None
            progress.update(
                min(round(read_bytes / 1e6), total),
                {f"throughput/{what}_per_second": rate for what, rate in speed.items()},
            )

        for chunk in chunks:
            check()
            path = work / f"{chunk.file_number:06d}-{chunk.number:06d}.npz"
            paths.append(path)
            if path.name in existing:
                read_bytes += chunk.input_bytes
                continue
            if progress is None:
                first, start = round(read_bytes / 1e6), time.monotonic()
                progress = Progress(total, first, unit="MB read", seconds_between_lines=_SECONDS_BETWEEN_LINES)
                stack.enter_context(progress)
            pending.append((chunk, executor.submit(process_chunk, settings, chunk, path)))
            while len(pending) > count_workers() + 2:
                finish_oldest()
        while pending:
            finish_oldest()
    return paths


Workers = tuple[concurrent.futures.Executor, Callable[[], int]]  # and how many chunks they process at a time


def _start_workers(workers: int, cluster: str | None) -> contextlib.AbstractContextManager[Workers]:
    if cluster:
        return _connect(cluster)
    return contextlib.nullcontext((_ThisProcess(), lambda: 1)) if workers == 1 else _start_pool(workers)


class _ThisProcess(concurrent.futures.Executor):
    """Does the work when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        done.set_result(function(*args, **kwargs))
        return done


class _Pool(concurrent.futures.ProcessPoolExecutor):
    """A pool whose workers never see Ctrl-C, not even while they start, when it would print a traceback."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        with _block_interrupts():  # submitting may start a worker, which inherits the mask
            return super().submit(function, *args, **kwargs)


@contextlib.contextmanager
def _block_interrupts() -> Iterator[None]:
    resource_tracker.ensure_running()  # which unblocks the signal when the first process starts it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _start_pool(workers: int) -> Iterator[Workers]:
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads in mid-step
    pool = _Pool(workers, spawn, start_worker)
    try:
        yield pool, lambda: workers
    except concurrent.futures.BrokenExecutor as error:
        raise DeviceMemoryError(
            "a worker process was killed, most often for lack of memory; the same command with fewer --workers continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Set up a worker process: it uses one thread, ignores signals to stop, and exits when its parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is faster than threads in each
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """The workers of a parent that was killed would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _connect(cluster: str) -> Iterator[Workers]:
    """The workers of a Dask cluster; those that join later are used too, and the tasks of lost ones are repeated."""
    try:
        from distributed import Client, KilledWorker, LocalCluster
    except ImportError as error:
        raise ConfigurationError("--cluster needs Dask; pip install 'fastroberta[cluster]'") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Sending large graph")  # text travels with its task, so none can get lost
        address: Any = cluster
        if cluster.startswith("local:"):
            with _block_interrupts():
                address = stack.enter_context(
                    LocalCluster(
                        n_workers=int(cluster.removeprefix("local:")),
                        threads_per_worker=1,
                        memory_limit=None,
                        dashboard_address=None,
                        silence_logs=logging.CRITICAL,
                        env={"TOKENIZERS_PARALLELISM": "false"},
                    )
                )
        try:
            client = stack.enter_context(Client(address))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"--cluster {cluster}: no Dask scheduler answers there ({error}); start one with `dask scheduler` and "
                "give the address that it prints"
            ) from error
        if not client.nthreads():
            print(f"--cluster {cluster}: waiting for workers to join", file=sys.stderr)
        executor = client.get_executor(pure=False)  # pure tasks could be mixed up with those of an earlier run
        stack.callback(executor.shutdown, wait=False)
        try:
            yield executor, lambda: sum(client.nthreads().values())
        except KilledWorker as error:
            raise DeviceMemoryError(
                "several workers in a row were killed by one task, most often for lack of memory; give the workers more "
                "and run the same command again"
            ) from error
        except concurrent.futures.CancelledError as error:
            raise ProcessError(
                f"--cluster {cluster}: the scheduler is gone; start it and its workers again, and the same command continues"
            ) from error
        except OSError as error:
            raise DataError(
                f"{error.filename}: a worker cannot use it ({error.strerror}); put --out on a disk that all workers share"
            ) from error
