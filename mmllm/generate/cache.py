"""Keys and values of what rows have read, in room that is planned when a row joins.

A row's tokens lie in its first `length` columns, so its column is its position, and rows of any lengths stand side by side. Rows in use
are the first ones: who leaves is replaced by the last. What lies behind a row's length is never seen and gets overwritten.

Letters: L layers, R rows, G key-value groups, T columns, k head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHORTEST = 16
"""Tokens in common that are worth copying."""


@dataclass
class Cache:
    """Room for R rows of T tokens; lengths are kept on the host, so that a step asks the device nothing."""

    store: Tensor  # [L, 2, R, G, T, k] keys and values
    turns: Tensor  # [T, 2, k] cosine and sine of the rotary angle at each position, for both halves; the sine negative in the first
    length: NDArray[np.int64]  # [R]

    @property
    def rows(self) -> int:
        return len(self.length)

    @property
    def columns(self) -> int:
        return len(self.turns)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def move_to(self, larger: "Cache") -> "Cache":
        """Everything read, in more room."""
        used = int(self.length.max()) if self.rows else 0
        larger.store[:, :, :self.rows, :, :used] = self.store[..., :used, :]
        larger.length[:self.rows] = self.length
        return larger

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Row target[i] becomes row source[i]; no row is in both."""
        if not target:
            return
        used = int(self.length[list(source)].max())
        a, b = (torch.tensor(x, device=self.turns.device) for x in (source, target))
        self.store[:, :, b, :, :used] = self.store[:, :, a, :, :used]
        self.length[list(target)] = self.length[list(source)]

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on, in this order."""
        used = int(self.length.max())
        self.store[:, :, :len(rows), :, :used] = self.store[:, :, rows, :, :used]
        self.length[:len(rows)] = self.length[rows]


@dataclass
class Prefixes:
    """What was read before, for prompts that begin alike: a conversation's earlier turns, a system's text. The least recently used go."""

    max_bytes: int = 256 << 20
    """Memory that may be held, beside the rows in use."""
    kept: list[tuple[NDArray[np.int64], Tensor]] = field(default_factory=list)
    """Ids [n], keys and values [L, 2, G, n, k]; the latest last."""
    reused: int = 0
    """Tokens that were not read again."""

    def keep(self, ids: Sequence[int], cache: Cache, row: int) -> None:
        """Remember the first len(ids) columns of a row. What they continue is forgotten."""
        if len(ids) < SHORTEST:
            return
        new = np.array(ids, np.int64)
        self.kept = [entry for entry in self.kept if _common(entry[0], new) < min(len(entry[0]), len(new))]
        self.kept.append((new, cache.store[:, :, row, :, :len(ids)].clone()))
        while self.kept and sum(store.nbytes for _, store in self.kept) > self.max_bytes:
            self.kept.pop(0)

    def fill(self, ids: Sequence[int], cache: Cache, row: int) -> int:
        """Copy the longest known beginning of a prompt into a row, at most all but its last token. → its tokens, the row's length now."""
        prompt = np.array(ids, np.int64)
        common = [min(_common(entry[0], prompt), len(prompt) - 1) for entry in self.kept]
        best = max(range(len(common)), key=common.__getitem__) if common else 0
        count = common[best] if common and common[best] >= SHORTEST else 0
        if count:
            entry = self.kept.pop(best)
            self.kept.append(entry)
            cache.store[:, :, row, :, :count] = entry[1][..., :count, :]
            self.reused += count
        cache.length[row] = count
        return count


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Ids that two rows begin with in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
