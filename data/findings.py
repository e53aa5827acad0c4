"""What is wrong in a shard: one line a fault, so that a million of them can be counted, sorted and searched."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Finding:
    """A fault of a shard or of one of its samples."""

    shard: str
    """File name."""
    key: str
    """Of the sample; empty where it is the shard's own fault."""
    what: str
    """Its cause, a colon, and what was met; faults of one cause count together."""

    @property
    def cause(self) -> str:
        return self.what.partition(": ")[0]

    def __str__(self) -> str:
        return "  ".join(map(printable, (self.shard, self.key or "–", self.what)))


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One shard that was looked at; row i belongs to its sample i."""

    shard: str
    key_hash: NDArray[np.uint64]
    """[n] of each sample's key."""
    good: NDArray[np.bool_]
    """[n] nothing is wrong with the sample by itself."""
    findings: tuple[Finding, ...]
    totals: Mapping[str, int] = field(default_factory=dict[str, int])
    """What a manifest counts, of this shard."""


def printable(text: str) -> str:
    """On one line whatever is in it, with no control character for a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
