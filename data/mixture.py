"""Which sources are mixed, in what shares, from which step on.

A *source* is a folder of token shards; a *stage* holds its sources and their weights from a step on. Documents are taken block by
block: of each block a source has its share, to the document, so that shares hold over any stretch of training and not only on
average; within a block its documents lie evenly spaced.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

UNIT = 32
"""bits of a share's fixed point: sums of shares stay exact"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Token shards that are mixed with others."""

    shards: Path | str
    """Folder of token shards with its manifest.json, or its URL."""
    prefix: str = "train"
    """Shards whose name starts so."""
    weight: float = 1.0
    """Share of this source, beside the others' weights, in the unit of the stage."""
    max_epochs: float | None = None
    """Passes over the source after which it is used up and the others share what it had; None for no end."""

    @property
    def name(self) -> str:
        return f"{self.shards}/{self.prefix}*"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is mixed from a step on."""

    sources: tuple[Source, ...]
    """At least one."""
    from_step: int = 0
    """First step of this mixture; it holds from the first block of documents that begins at or behind it."""
    weigh: Literal["tokens", "samples", "epochs"] = "tokens"
    """What weights are shares of: tokens, documents, or passes over each source."""


class Share(NamedTuple):
    """What a stage needs to know of a source."""

    weight: float
    documents: int
    tokens: int
    limit: int | None
    """Documents that may be taken over the whole run; None for no end."""


class Cursor(NamedTuple):
    """Where a block begins, and what lies before it."""

    row: int
    """its first"""
    taken: tuple[int, ...]
    """[sources] documents"""
    due: tuple[int, ...]
    """[sources] documents in fixed point, fractions and all"""
    cut: int = 0
    """documents longer than a row that were split or truncated"""
    left_out: int = 0
    """and those that were not trained on"""


def violations(stages: tuple[Stage, ...]) -> list[str]:
    """What is wrong with a mixture, each naming the thing, the value, the limit and the field."""
    out = list[str]()
    if stages and stages[0].from_step != 0:
        out.append(f"the first stage begins at step {stages[0].from_step}: data.stages[0].from_step is 0")
    for number, (a, b) in enumerate(pairwise(stages), 1):
        if b.from_step <= a.from_step:
            out.append(f"data.stages[{number}].from_step is {b.from_step}, not behind the {a.from_step} of the stage before")
    for number, stage in enumerate(stages):
        if not stage.sources or not any(source.weight > 0 for source in stage.sources):
            out.append(f"data.stages[{number}] has no source of positive weight")
        names = [source.name for source in stage.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        out += [f"data.stages[{number}] lists {name} twice: give it the sum of the weights" for name in twice]
        for source in stage.sources:
            if not 0 <= source.weight < float("inf"):
                out.append(f"data.stages[{number}]: source {source.name} has weight {source.weight}: weights are at least 0")
            if source.max_epochs is not None and not source.max_epochs > 0:
                out.append(f"data.stages[{number}]: source {source.name} has max_epochs {source.max_epochs}: more than 0, or None")
    return out


def per_document(shares: list[Share], weigh: str) -> NDArray[np.float64]:
    """Weights [sources] → shares of the documents."""
    unit = {"tokens": lambda s: s.documents / max(s.tokens, 1), "samples": lambda s: 1.0, "epochs": lambda s: float(s.documents)}[weigh]
    return np.array([share.weight * unit(share) for share in shares])


def take(cursor: Cursor, weights: NDArray[np.float64], limits: list[int | None], block_len: int) -> tuple[list[int], Cursor]:
    """Documents of each source in the next block of about `block_len`, and the cursor behind it (its row still the block's own).
    A source that is used up gives its share to the others; no documents at all: the mixture has ended."""
    left = [w if limit is None or taken < limit else 0.0 for w, limit, taken in zip(weights, limits, cursor.taken, strict=True)]
    whole = sum(left)
    if not whole:
        return [0] * len(left), cursor
    due = tuple(d + round(block_len * w / whole * 2**UNIT) for d, w in zip(cursor.due, left, strict=True))
    half = 2**(UNIT - 1)
    counts = [((d + half) >> UNIT) - ((before + half) >> UNIT) for d, before in zip(due, cursor.due, strict=True)]
    counts = [n if limit is None else min(n, limit - taken) for n, limit, taken in zip(counts, limits, cursor.taken, strict=True)]
    return counts, cursor._replace(taken=tuple(t + n for t, n in zip(cursor.taken, counts, strict=True)), due=due)


def spread(counts: list[int], offsets: list[float]) -> NDArray[np.int64]:
    """Order of a block's documents, given source after source: each source evenly spaced, at its own offset in [0, 1). → a permutation
    [sum of counts]"""
    times = np.concatenate([(np.arange(n) + offset) / n for n, offset in zip(counts, offsets, strict=True) if n] or [np.zeros(0)])
    return np.argsort(times, kind="stable")
