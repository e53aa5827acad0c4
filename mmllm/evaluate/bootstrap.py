"""How sure a number is: intervals by the bootstrap (Efron 1979, doi:10.1214/aos/1176344552), paired where two models did the same work.

A *unit* is what was drawn by chance and could have been another: a picture with all its questions, a prompt with all its pictures. Each
leaves a row of sums, and a measure is a function of the sum of all rows; so a resample costs one row of a matrix product, answers about
one picture stay together, and two models whose units are the same are compared under the same resamples.

Letters: n units, k columns, r resamples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TAIL = 2.5
"""Percent of the resamples left out at either end: intervals are of 95 %."""
AT_ONCE = 4_000_000
"""Weights held at a time: 32 MB."""


def _bleu(sums: Floats) -> Floats:
    """Papineni et al. 2002 (doi:10.3115/1073083.1073135, section 2.3): [..., 2 N + 2], matched and all n-grams of each length, then
    words said and words of the references that are nearest in length."""
    most = (sums.shape[-1] - 2) // 2
    matched, counted, said, wanted = sums[..., :most], sums[..., most:2 * most], sums[..., -2], sums[..., -1]
    logs = np.log(np.maximum(matched, 1e-15) / np.maximum(counted, 1e-9)).mean(-1)
    return np.exp(logs + np.minimum(0.0, 1 - wanted / np.maximum(said, 1e-9)))


VALUE: dict[str, Callable[[Floats], Floats]] = {
    "ratio": lambda sums: sums[..., 0] / sums[..., 1],
    "exp": lambda sums: np.exp(sums[..., 0] / sums[..., 1]),
    "macro": lambda sums: np.nanmean(sums[..., ::2] / sums[..., 1::2], -1),
    "bleu": _bleu,
}
"""By name: summed rows [..., k] → values [...]."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a number is made of."""

    units: tuple[str, ...]
    """Names, one a row."""
    rows: Floats
    """[n, k]"""
    of: str = "ratio"
    """Which of VALUE."""
    better: int = 1
    """1 where more is better, -1 where less is."""

    @property
    def value(self) -> float:
        with np.errstate(all="ignore"):
            return float(VALUE[self.of](self.rows.sum(0)))


def mean(units: list[str] | tuple[str, ...], values: Any, better: int = 1) -> Measure:
    """The mean of one number a unit."""
    values = np.asarray(values, np.float64)
    return Measure(units=tuple(units), rows=np.stack([values, np.ones(len(values))], 1), better=better)


def weights(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of n units is in each resample, [some, n] at a time; a function of the arguments alone."""
    random, some = np.random.default_rng((seed, n)), max(1, AT_ONCE // n)
    for first in range(0, resamples, some):
        yield random.multinomial(n, np.full(n, 1 / n), min(some, resamples - first)).astype(np.float64)


def resampled(measure: Measure, resamples: int, seed: int) -> Floats:
    """The value in each resample. → [r]"""
    with np.errstate(all="ignore"):
        return np.concatenate([VALUE[measure.of](w @ measure.rows) for w in weights(len(measure.rows), resamples, seed)])


def number(measure: Measure, resamples: int, seed: int) -> dict[str, Any]:
    """Value with its interval (percentiles of the resamples) and standard error."""
    low, high, error = _spread(resampled(measure, resamples, seed))
    return {"value": measure.value, "low": low, "high": high, "error": error,
            "units": len(measure.rows), "better": measure.better}


def difference(before: Measure, after: Measure, resamples: int, seed: int) -> dict[str, Any]:
    """after − before with its interval: paired where both have the same units, in any order; else as of two samples."""
    paired = len(set(before.units)) == len(before.units) and sorted(before.units) == sorted(after.units)
    if paired:
        place = {unit: row for row, unit in enumerate(after.units)}
        after = Measure(units=before.units, rows=after.rows[[place[unit] for unit in before.units]], of=after.of, better=after.better)
    low, high, _ = _spread(resampled(after, resamples, seed if paired else seed + 1) - resampled(before, resamples, seed))
    return {"value": after.value - before.value, "low": low, "high": high, "paired": paired}


def _spread(values: Floats) -> tuple[float, float, float]:
    """Of resampled values [r]: low and high of the interval, and the standard deviation; those that are no number do not count."""
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan, np.nan
    low, high = np.percentile(values, (TAIL, 100 - TAIL))
    return float(low), float(high), float(values.std())
