"""Which document is number k of a source: every epoch another shuffle, and none of them held in memory.

Shards are shuffled, then taken a few at a time, and the documents of those few are shuffled among each other. So a reader has a few
shards open, however many there are; where a source has no more than that, the shuffle is complete.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.chance import salted, shuffled


@dataclass(frozen=True)
class Group:
    """Shards whose documents are shuffled together: their numbers, and the position in the epoch of their first document."""

    shards: tuple[int, ...]
    first: int
    size: int
    """Documents."""


class Order:
    """The endless list of a source's documents, epoch after epoch."""

    def __init__(self, counts: NDArray[np.int64], mixed: int, seed: int) -> None:
        """counts [shards]: documents of each; mixed: shards in a group."""
        if mixed < 1:
            raise ValueError(f"{mixed} shards are shuffled together: data.shuffle_shards is at least 1")
        self.counts, self.mixed, self.seed = counts, mixed, seed
        self.size = int(counts.sum())
        """Documents of an epoch."""
        self._shards = lru_cache(2)(self._shards_of)

    def _shards_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards in the order of an epoch, and the position of each group's first document [groups + 1]."""
        shards = shuffled(np.arange(len(self.counts)), len(self.counts), salted(self.seed, epoch))
        ends = np.cumsum(self.counts[shards])
        return shards, np.concatenate([[0], ends[self.mixed - 1:-1:self.mixed], ends[-1:]])

    def group(self, epoch: int, number: int) -> Group:
        shards, first = self._shards(epoch)
        mine = shards[number * self.mixed:(number + 1) * self.mixed]
        return Group(tuple(mine.tolist()), int(first[number]), int(first[number + 1] - first[number]))

    def places(self, first: int, end: int) -> list[tuple[int, int, NDArray[np.int64]]]:
        """Documents `first` … `end` − 1 of the endless list: (epoch, group, [n] which of the group's documents) piece by piece."""
        pieces: list[tuple[int, int, NDArray[np.int64]]] = []
        while first < end:
            epoch, position = divmod(first, self.size)
            _, starts = self._shards(epoch)
            number = int(np.searchsorted(starts, position, "right")) - 1
            stop = min(end - epoch * self.size, int(starts[number + 1]))
            inside = np.arange(position, stop) - starts[number]
            pieces.append((epoch, number, shuffled(inside, int(starts[number + 1] - starts[number]), salted(self.seed, epoch, number))))
            first = epoch * self.size + stop
        return pieces
