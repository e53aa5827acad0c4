"""Chance without a stream: numbers that are a function of seed, sample and what they decide, so that any rank can decide alone.

All of it is 64-bit integer arithmetic of ours, so it is the same for every version of every library; compiled by numba, since a plan
asks for it by the million.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, inline="always")
def _scramble(value, salt):  # type: ignore[no-untyped-def]
    """Two rounds of SplitMix64 (Steele et al. 2014, OOPSLA, figure 17)."""
    z = value ^ salt
    for _ in range(2):
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z


@njit(cache=True)
def _scrambled(values, salt):  # type: ignore[no-untyped-def]
    out = np.empty_like(values)
    for i in range(len(values)):
        out[i] = _scramble(values[i], salt)
    return out


@njit(cache=True)
def _uniform(values, salt):  # type: ignore[no-untyped-def]
    out = np.empty(len(values), np.float64)
    for i in range(len(values)):
        out[i] = np.float64(_scramble(values[i], salt) >> np.uint64(11)) / 9007199254740992.0  # 2⁵³
    return out


@njit(cache=True)
def _shuffled(positions, size, low, high, salt):  # type: ignore[no-untyped-def]
    out = np.empty_like(positions)
    low_mask, high_mask, one = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << high) - np.uint64(1), np.uint64(1)
    for i in range(len(positions)):
        x = positions[i]
        while True:
            left, right, key = x >> low, x & low_mask, salt
            for _ in range(4):
                left ^= _scramble(right, key) & high_mask
                right ^= _scramble(left, key + one) & low_mask
                key += np.uint64(2)
            x = (left << low) | right
            if x < size:
                break
        out[i] = x
    return out


def scrambled(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """A hash of 64 bits for each value, under `salt`."""
    return _scrambled(values, np.uint64(salt % 2**64))


def salted(*numbers: int) -> int:
    """One salt of several numbers."""
    z = np.zeros(1, np.uint64)
    for number in numbers:
        z = scrambled(z, number)
    return int(z[0])


def uniform(seed: int, key_hash: NDArray[np.uint64], epoch: int, salt: int) -> NDArray[np.float64]:
    """A number in [0, 1) a sample, of (seed, key, epoch, salt)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + salt * 0x8CB92BA72F3D8DD7) % 2**64
    return _uniform(key_hash, np.uint64(mixed))


def shuffled(positions: NDArray[np.int64], size: int, salt: int) -> NDArray[np.int64]:
    """Where a shuffle of 0 … size − 1 has its elements number `positions`; any of them in O(1), no permutation is held.

    A Feistel network over the smallest power of two that holds `size`, walked until it falls below `size` (Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains", section 5)."""
    bits = max(2, (size - 1).bit_length())
    numbers = (np.uint64(n) for n in (size, bits // 2, bits - bits // 2, salt % 2**64))
    return _shuffled(positions.astype(np.uint64), *numbers).astype(np.int64)
