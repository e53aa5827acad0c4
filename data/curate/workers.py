"""The same work on each of many shards, on several processes. Shard i belongs to process i mod n, which keeps what it loaded."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path

import torch

from data.encode import ProcessFailed
from data.processes import end_with_parent

Tell = Callable[[int, int, Mapping[str, float]], None]
"""Told (shards done, shards, {"documents/s": …})."""
Work = Callable[[Path], int]
"""Does one shard. → its documents"""


def silent(done: int, total: int, measures: Mapping[str, float]) -> None:
    """Tells nobody."""


def on_each(work: Work, shards: Sequence[Path], processes: int, progress: Tell = silent, done: int = 0) -> None:
    """`work` goes to other processes as it is: a function of a module, or a `partial` of one. `done` shards were there before.
    Errors: what `work` raises, and shards that wait are given up; ProcessFailed where a process was killed."""
    if processes < 1:
        raise ValueError(f"processes is {processes}: there is at least one")
    total, documents, began = done + len(shards), 0, time.perf_counter()
    progress(done, total, {})

    def tell(count: int) -> None:
        nonlocal documents, done
        documents, done = documents + count, done + 1
        progress(done, total, {"documents/s": documents / max(time.perf_counter() - began, 1e-6)})

    processes = min(processes, len(shards))
    if processes <= 1:
        for shard in shards:
            tell(work(shard))
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    context = multiprocessing.get_context("spawn")  # a fork takes torch's threads along as if they still ran
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context, _begin, (number, threads))) for number in range(processes)]
        waiting: list[Future[int]] = [pools[i % processes].submit(work, shard) for i, shard in enumerate(shards)]
        try:
            for future in as_completed(waiting):
                tell(future.result())
        except BrokenProcessPool as error:
            raise ProcessFailed("a process ended without a word (killed? out of memory?): the same command goes on behind the shards "
                                "that are whole") from error
        finally:
            for future in waiting:
                future.cancel()


def _begin(number: int, threads: int) -> None:
    """A process's life begins."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the parent too, who ends us
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
