"""Rows made ahead of time by worker processes, which change nothing but the waiting: a row depends on its number alone."""

import signal
from collections.abc import Iterable, Iterator
from typing import Protocol

from torch.utils.data import DataLoader, Dataset

from data.loader import Row

GRACE_S = 60
"""Seconds that a worker lives after SIGTERM."""


class Rows(Protocol):
    def row(self, number: int, /) -> Row: ...


class _ByNumber(Dataset[Row]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Row:
        return self.rows.row(index)


def prefetched(rows: Rows, numbers: Iterable[int], workers: int, depth: int = 8) -> Iterator[Row]:
    """Rows `numbers`, in that order. workers: processes that stay up to `depth` rows ahead each; 0 makes them here when asked.

    Errors: those of making a row; RuntimeError for a worker that was killed."""
    if not workers:
        return map(rows.row, numbers)
    return iter(DataLoader(_ByNumber(rows), batch_size=None, sampler=numbers, num_workers=workers, prefetch_factor=depth,
                           collate_fn=_as_it_is, worker_init_fn=_patient))  # type: ignore[arg-type]


def _patient(worker: int) -> None:
    """A signal to the whole process group is the trainer's to act on, which then saves: a worker that hears SIGTERM goes on for a while."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))


def _as_it_is(row: Row) -> Row:
    return row
