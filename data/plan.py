"""Which documents are in row number n: a pure function of seed, mixture and indexes.

Documents are taken in blocks (mixture.py says how many of each source, order.py which), each block is packed on its own
(packing.py), and rows are numbered through. To find a row its block must be known, hence how many rows the blocks before it have: the
plan packs them once, 0.1 µs a document, and keeps a cursor of each. A run saves the cursor with its checkpoints and goes on from there.

Letters: n documents of a block, or pieces of them where they are longer than a row.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import mixture
from data.chance import salted
from data.choices import Choice, Table, choose
from data.config import DataConfig
from data.mixture import UNIT, Cursor, Share
from data.order import Group, Order
from data.packing import placed
from data.sequence import pieces

PLAN_VERSION = 2


class Listed(NamedTuple):
    """What a plan knows of a source before it reads an index."""

    counts: NDArray[np.int64]
    """[shards] documents"""
    tokens: int
    """of all of them, about"""
    hashes: list[str]
    """of each shard's index"""
    read: Callable[[Group], Table]
    """Indexes of a few shards, joined."""


class Place(NamedTuple):
    """Where a document is: source, its epoch, the group of shards of that epoch, and the number in the group's table."""

    source: int
    epoch: int
    group: int
    number: int


class Block(NamedTuple):
    """Documents that were packed together [n], and the rows they make."""

    first_row: int
    source: NDArray[np.int64]
    epoch: NDArray[np.int64]
    group: NDArray[np.int64]
    number: NDArray[np.int64]
    """in the table of the group"""
    task: NDArray[np.int8]
    prompt: NDArray[np.int64]
    text_first: NDArray[np.bool_]
    begin: NDArray[np.int64]
    """first id of the sequence that is taken"""
    end: NDArray[np.int64]
    order: NDArray[np.int64]
    """documents row after row"""
    starts: NDArray[np.int64]
    """[rows + 1] where each row begins in `order`"""
    cut: int
    """documents longer than a row of which pieces are here"""
    left_out: int
    """and of which there are none"""

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def members(self, which: NDArray[np.int64]) -> Iterator[tuple[Place, Choice, int, int]]:
        """Documents `which` [d]: where each is, what it is trained as, and the ids of its sequence that are taken."""
        for source, epoch, group, number, *choice, begin, end in zip(*(column[which].tolist() for column in self[1:10]), strict=True):
            yield Place(source, epoch, group, number), Choice(*choice), begin, end


class Plan:
    """Rows by number. Errors: ValueError for a mixture that is none, or has ended; what reading indexes raises."""

    def __init__(self, config: DataConfig, listed: Mapping[str, Listed], first_row: Callable[[int], int] = lambda step: step) -> None:
        """listed: by `Source.name`; first_row: of a step."""
        if wrong := mixture.violations(config.stages):
            raise ValueError("; ".join(wrong))
        if config.block_len < 1:
            raise ValueError(f"data.block_len is {config.block_len}, must be at least 1")
        self.config, self.stages = config, config.mixtures
        self.names = list(dict.fromkeys(source.name for stage in self.stages for source in stage.sources))
        self.sources = [listed[name] for name in self.names]
        if empty := [name for name, source in zip(self.names, self.sources, strict=True) if not source.counts.sum()]:
            raise ValueError(f"source {empty[0]} holds no document")
        self.orders = [Order(source.counts, config.shuffle_shards, salted(config.seed, i)) for i, source in enumerate(self.sources)]
        self._first_rows = [first_row(stage.from_step) for stage in self.stages]
        self._mixed = [self._weights(number) for number in range(len(self.stages))]
        self.block = lru_cache(4)(self._block)
        self.table = lru_cache(3 * len(self.names))(self._table)
        self._start(Cursor(0, (0,) * len(self.names), (0,) * len(self.names)))

    def _start(self, cursor: Cursor) -> None:
        self._cursors, self._rows = [cursor], [cursor.row]
        self.block.cache_clear()

    def _weights(self, stage: int) -> tuple[NDArray[np.float64], list[int | None]]:
        """Shares of the documents, and limits, of every source of the run."""
        shares = {source.name: Share(source.weight, int(self.sources[i].counts.sum()), self.sources[i].tokens,
                                     None if source.max_epochs is None else round(source.max_epochs * int(self.sources[i].counts.sum())))
                  for source in self.stages[stage].sources for i in [self.names.index(source.name)]}
        absent = Share(0, 1, 1, None)
        listed = [shares.get(name, absent) for name in self.names]
        return mixture.per_document(listed, self.stages[stage].weigh), [share.limit for share in listed]

    def _stage(self, row: int) -> int:
        return bisect_right(self._first_rows, row) - 1

    # Finding a row ------------------------------------------------------------------------------------------------

    def row(self, number: int) -> tuple[Block, NDArray[np.int64]]:
        """Row `number` of the endless list: a block, and which of its documents [d] are in the row, in order."""
        found = self.block(self._at(number))
        inside = number - found.first_row
        return found, found.order[found.starts[inside]:found.starts[inside + 1]]

    def _at(self, row: int) -> int:
        """Number of the block that holds a row, among those whose cursor is known."""
        if row < self._rows[0]:
            self._start(Cursor(0, (0,) * len(self.names), (0,) * len(self.names)))
        barren = 0
        while row >= self._rows[-1]:
            last = len(self._cursors) - 1
            block = self.block(last)
            cursor = self._behind(last)
            barren = 0 if block.rows else barren + sum(cursor.taken) - sum(self._cursors[last].taken)
            if barren > sum(order.size for order in self.orders):
                raise ValueError(f"no document fits in a row of {self.config.row_len:,} tokens: raise data.row_len")
            if cursor == self._cursors[last]:
                raise ValueError(f"there is no row {row:,}: the mixture ends after {self._rows[-1]:,} rows, its sources are used up. Raise "
                                 "max_epochs of a source in data.stages, or end the run before")
            self._cursors.append(cursor)
            self._rows.append(cursor.row)
        return bisect_right(self._rows, row) - 1

    def _behind(self, number: int) -> Cursor:
        """Cursor behind a block."""
        cursor, block = self._cursors[number], self.block(number)
        weights, limits = self._mixed[self._stage(cursor.row)]
        _, after = mixture.take(cursor, weights, limits, self.config.block_len)
        row = cursor.row + block.rows
        due = tuple(taken << UNIT for taken in after.taken) if self._stage(row) != self._stage(cursor.row) else after.due
        return Cursor(row, after.taken, due, cursor.cut + block.cut, cursor.left_out + block.left_out)

    # Making a block -----------------------------------------------------------------------------------------------

    def _table(self, source: int, epoch: int, group: int) -> Table:
        return self.sources[source].read(self.orders[source].group(epoch, group))

    def _block(self, number: int) -> Block:
        cursor, config = self._cursors[number], self.config
        weights, limits = self._mixed[self._stage(cursor.row)]
        counts, _ = mixture.take(cursor, weights, limits, config.block_len)
        columns: list[tuple[NDArray[np.generic], ...]] = []
        for source, (first, count) in enumerate(zip(cursor.taken, counts, strict=True)):
            for epoch, group, inside in self.orders[source].places(first, first + count):
                chosen = choose(self.table(source, epoch, group), inside, epoch, config)
                fixed = (np.full(len(inside), value) for value in (source, epoch, group))
                columns.append((*fixed, inside, chosen.task, chosen.prompt, chosen.text_first, np.zeros_like(inside), chosen.length))
        if not columns:
            columns = [(np.zeros(0, np.int64),) * 9]
        offsets = [salted(config.seed, source) / 2**64 for source in range(len(counts))]
        order = mixture.spread(counts, offsets)
        mixed = (np.concatenate(column)[order] for column in zip(*columns, strict=True))
        block = Block._make((cursor.row, *mixed, order, order, 0, 0))
        if (block.end > config.row_len).any():
            block = self._shortened(block)
        placed_order, starts = placed(block.end - block.begin, config.row_len, config.window)
        return block._replace(order=placed_order, starts=starts)

    def _shortened(self, block: Block) -> Block:
        """With documents longer than a row cut, or left out, as the recipe says."""
        config, cut, left_out, taken = self.config, 0, 0, list[tuple[int, int, int]]()
        for i in range(len(block.end)):
            if block.end[i] <= config.row_len:
                taken.append((i, 0, int(block.end[i])))
                continue
            table = self.table(int(block.source[i]), int(block.epoch[i]), int(block.group[i]))
            number = int(block.number[i])
            if config.long_documents == "refuse":
                raise ValueError(f"sample {table.keys[number].decode(errors='replace')} of {self.names[block.source[i]]} has "
                                 f"{block.end[i]:,} tokens, a row holds {config.row_len:,}: raise data.row_len, or say with "
                                 "data.long_documents what becomes of it")
            parts = slice(int(table.first_part[number]), int(table.first_part[number + 1]))
            cuts = [] if config.long_documents == "drop" else pieces(table.kinds[parts].tolist(), table.lengths[parts].tolist(),
                                                                     int(block.task[i]), config.row_len)
            if config.long_documents == "truncate":
                cuts = cuts[:1]
            cut, left_out = cut + bool(cuts), left_out + (not cuts)
            taken += [(i, first, end) for first, end in cuts]
        which, begin, end = np.array(taken, np.int64).reshape(-1, 3).T
        kept = (column[which] for column in block[1:8])
        return Block._make((block.first_row, *kept, begin, end, block.order, block.starts, cut, left_out))

    # State --------------------------------------------------------------------------------------------------------

    def hash(self, rows: int | None = None) -> str:
        """One name for everything that decides rows before number `rows`, or all of them. 16 hex digits.

        A stage that begins later is no part of it: one may be added to a run that has not come to it."""
        settings = {k: v for k, v in asdict(self.config).items() if k not in ("shards", "prefix", "stages", "tokenizer", "text")}
        stages = [[first, stage.weigh, [[source.weight, source.max_epochs, self.sources[self.names.index(source.name)].hashes]
                                        for source in stage.sources]]
                  for first, stage in zip(self._first_rows, self.stages, strict=True) if not first or rows is None or first < rows]
        return hashlib.sha256(json.dumps([PLAN_VERSION, settings, stages]).encode()).hexdigest()[:16]

    def state(self, rows: int) -> dict[str, Any]:
        """What a run that has consumed `rows` rows saves."""
        return {"plan_hash": self.hash(rows), "consumed_rows": rows, "cursor": self._cursors[self._at(max(rows - 1, 0))]._asdict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Errors: ValueError where the rows before it would be others now."""
        if (now := self.hash(state["consumed_rows"])) != state["plan_hash"]:
            raise ValueError(f"data order (plan {state['plan_hash']} then, {now} now): seed, sources, weights or a setting of data "
                             "changed. Add a stage to data.stages with the step from which the new mixture holds")
        cursor = Cursor(**state["cursor"])
        later = (0,) * (len(self.names) - len(cursor.taken))  # sources of stages that were added
        self._start(cursor._replace(taken=(*cursor.taken, *later), due=(*cursor.due, *later)))
