"""Which of n hashes of 64 bits differ in at most d bits: all such pairs, without looking at all pairs.

Cut into d + c bands, two hashes within d bits agree in c of them at least, so that sorting by every choice of c bands brings them side by
side (Manku, Jain, Das Sarma 2007, "Detecting near-duplicates for web crawling", WWW, section 3.1). Nothing is missed. c trades the number
of sorts against the length of the runs that are compared: 10^8 hashes are sorted 15 times for d = 4.

Letters: n hashes, d distance in bits, c bands of m = d + c that agree, k pairs.
"""

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.chance import scrambled

BITS = 64
FARTHEST = 16
"""Pictures that have nothing in common differ in 32 bits on average, with a standard deviation of 4."""


class Pairs(NamedTuple):
    """Positions of two hashes, first < second, and the bits in which they differ: [k] each."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: NDArray[np.uint8]


def check(within: int) -> None:
    """Errors: ValueError for a distance beyond what alike means."""
    if not 0 <= within <= FARTHEST:
        raise ValueError(f"distance is {within}: hashes are alike within 0 to {FARTHEST} bits of {BITS}, beyond it by chance")


def distance(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """[k], [k] → bits in which they differ [k]"""
    return np.bitwise_count(one ^ other)


def near(hashes: NDArray[np.uint64], within: int, apart: NDArray[np.uint64] | None = None) -> Pairs:
    """All pairs of [n] that differ in at most `within` bits, each once; with `apart` [n] only those that are equal in it.
    Memory is some 90 bytes a hash, and 17 a pair."""
    check(within)
    found = list(_found(hashes, within, np.zeros_like(hashes) if apart is None else apart))
    empty = np.zeros(0, np.int64)
    first, second = (np.concatenate([empty, *(pair[i] for pair in found)]) for i in (0, 1))
    return Pairs(np.minimum(first, second), np.maximum(first, second), distance(hashes[first], hashes[second]))


def _found(hashes: NDArray[np.uint64], within: int, apart: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    agreeing = _agreeing(len(hashes), within)
    bands = _bands(within + agreeing)
    groups = scrambled(apart, 1)
    for chosen in combinations(range(len(bands)), agreeing):
        mask = np.bitwise_or.reduce(bands[list(chosen)])
        keys = (hashes & mask) ^ groups
        order = np.argsort(keys)
        keys, near_by = keys[order], hashes[order]
        # neighbours, then the next but one, …: what has its like s places on has it at every place before
        here, step = np.arange(len(keys)), 0
        while len(here):
            step += 1
            here = here[:np.searchsorted(here, len(keys) - step)]
            here = here[keys[here] == keys[here + step]]
            differ = near_by[here] ^ near_by[here + step]
            hit = np.bitwise_count(differ) <= within
            first, second, differ = order[here[hit]], order[here[hit] + step], differ[hit]
            # a pair that agrees in more bands turns up again: it is taken where its first bands are the chosen ones
            agree = (differ[:, None] & bands) == 0  # [k, m]
            own = (agree & (agree.cumsum(1) <= agreeing) == np.isin(np.arange(len(bands)), chosen)).all(1)
            own &= apart[first] == apart[second]
            yield first[own], second[own]


def _agreeing(n: int, within: int) -> int:
    """c of least work: sorting takes some 10 times as long for a hash as a pair that agrees by chance does."""
    def work(c: int) -> float:
        return comb(within + c, c) * (10 * n + n * n / 2**(BITS * c / (within + c) + 1))
    return min(range(1, 6), key=work)


def _bands(count: int) -> NDArray[np.uint64]:
    """[m] masks that cut a hash into bands of widths within one bit."""
    edges = [BITS * i // count for i in range(count + 1)]
    return np.array([(1 << high) - (1 << low) for low, high in pairwise(edges)], np.uint64)
