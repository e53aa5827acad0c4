"""Token shards → packed rows, in an order that is a pure function of the recipe.

Row n depends on seed, token shards and settings, not on who asks: ranks take slices of the same endless list of rows, so
the data order survives any change of width. Which documents are in it says plan.py; here they are read and put side by side.

Letters: s tokens in a row, d documents in it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data import index, sequence, store
from data.choices import Choice, Table, question_order
from data.config import DataConfig
from data.document import QUESTION, TokenDocument
from data.mixture import Source
from data.order import Group
from data.plan import Listed, Place, Plan
from data.sequence import CHAT, DRAW, INTERLEAVED, TokenSequence
from data.vocab import Vocab

if TYPE_CHECKING:
    from data.online import OnlineShards


@dataclass(frozen=True)
class Row:
    """One packed row. Documents do not see each other; padding is a document of its own at the end."""

    tokens: NDArray[np.int64]
    """[s]"""
    labels: NDArray[np.int64]
    """[s] the next token of the same document; pad where there is none."""
    loss_weight: NDArray[np.float32]
    """[s] weight of predicting the label."""
    cu_seqlens: NDArray[np.int32]
    """[d + 1] first token of each document, and s."""
    keys: tuple[str, ...]
    """Samples in the row, for a report of what was in a bad step."""


def assemble(sequences: list[TokenSequence], keys: tuple[str, ...], row_len: int, pad: int) -> Row:
    """Sequences side by side in one row, the rest padding."""
    tokens = np.full(row_len, pad, np.int64)
    labels = np.full(row_len, pad, np.int64)
    weight = np.zeros(row_len, np.float32)
    borders, at = [0], 0
    for each in sequences:
        end = at + len(each.ids)
        tokens[at:end] = each.ids
        labels[at:end - 1] = each.ids[1:]
        weight[at:end - 1] = each.loss_weight[1:]
        borders.append(end)
        at = end
    if at < row_len:
        borders.append(row_len)
    return Row(tokens, labels, weight, np.array(borders, np.int32), keys)


class Shards:
    """The token shards of one source: their list at once, indexes and payload as they are asked for."""

    def __init__(self, source: Source) -> None:
        self.folder = source.shards
        self.manifest = index.read_manifest(self.folder)
        self.fingerprint = str(self.manifest["fingerprint"])
        self.vocab = Vocab.of(self.manifest["vocab"])
        self.names = sorted(name for name in self.manifest["shards"] if name.startswith(source.prefix))
        if not self.names:
            raise FileNotFoundError(f"{self.folder} lists no shard named {source.prefix}*.tar")
        self.listed = [self.manifest["shards"][name] for name in self.names]
        self.payload = lru_cache(None)(self._payload)
        if store.url(self.folder) is None:  # in a store, as they are opened: a request each
            for number in range(len(self.names)):
                self._payload(number)

    def plan(self) -> Listed:
        counts = np.array([listed["documents"] for listed in self.listed], np.int64)
        share = counts.sum() / max(self.manifest["documents"], 1)
        return Listed(counts, round(share * (self.manifest["image_codes"] + self.manifest["text_ids"])),
                      [listed["index"] for listed in self.listed], self.table)

    def table(self, group: Group) -> Table:
        return Table.join([self.index(number) for number in group.shards])

    def index(self, number: int) -> index.Index:
        place = store.join(self.folder, self.names[number])
        try:
            content = store.read_bytes(store.join(self.folder, index.index_path(Path(self.names[number])).name))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"token shard {place} has no index: encode it again") from error
        if hashlib.sha256(content).hexdigest()[:16] != self.listed[number]["index"]:
            raise ValueError(f"the index of token shard {place} is not the one in the manifest: encode the shard again")
        found = index.of_bytes(content, place, self.fingerprint)
        if len(found.keys) != self.listed[number]["documents"] or (found.offsets > self.listed[number]["bytes"] - found.sizes).any():
            raise ValueError(f"the index of token shard {place} lists other documents than the manifest, or some outside the shard: "
                             "encode the shard again")
        return found

    def _payload(self, number: int) -> store.Reader:
        place = store.join(self.folder, self.names[number])
        try:
            reader = store.open(place)
        except FileNotFoundError:
            reader = None
        if reader is None or reader.size != self.listed[number]["bytes"]:
            raise ValueError(f"token shard {place} is missing or not the one in the manifest: encode it again")
        return reader


def opened(source: Source, config: DataConfig) -> "Shards | OnlineShards":
    """Token shards, or raw ones where the recipe names the tokenizers that encode them."""
    if config.tokenizer is None and config.text is None:
        return Shards(source)
    if config.tokenizer is None or config.text is None:
        raise ValueError(f"data.tokenizer is {config.tokenizer} and data.text {config.text}: raw shards need both, token shards neither")
    from data.online import OnlineShards

    return OnlineShards(source, config.tokenizer, config.text)


class Loader:
    """Rows by number. Errors: ValueError or FileNotFoundError that names a shard, a fingerprint or a document."""

    def __init__(self, config: DataConfig, fingerprint: str | None = None, first_row: Callable[[int], int] = lambda step: step) -> None:
        """`fingerprint`: that of the tokenizers in use; shards made by others are refused. `first_row` of a step, for mixtures that
        change at one."""
        self.config, self.row_len = config, config.row_len
        self.shards = {source.name: opened(source, config) for stage in config.mixtures for source in stage.sources}
        first = next(iter(self.shards.values()))
        self.vocab, self.fingerprint = first.vocab, first.fingerprint
        for name, shards in self.shards.items():
            if (wanted := fingerprint or self.fingerprint) != shards.fingerprint:
                raise ValueError(f"token shards {name} were encoded under fingerprint {shards.fingerprint}, "
                                 f"{'the tokenizers in use have' if fingerprint else 'other sources of the mixture under'} {wanted}: "
                                 "encode the shards again")
        self.plan = Plan(config, {name: shards.plan() for name, shards in self.shards.items()}, first_row)
        self._by_number = [self.shards[name] for name in self.plan.names]

    def row(self, number: int) -> Row:
        """Row `number`, 0 …, of the endless list."""
        block, members = self.plan.row(number)
        sequences, keys = list[TokenSequence](), list[str]()
        placed = list(block.members(members))
        for doc, (place, choice, begin, end) in zip(self.documents([place for place, *_ in placed]), placed, strict=True):
            whole = self.sequence(doc, place, choice)
            sequences.append(whole if end - begin == len(whole.ids) else whole[begin:end])
            keys.append(self.key(place))
        return assemble(sequences, tuple(keys), self.row_len, self.vocab.pad)

    def state(self, consumed_rows: int) -> dict[str, Any]:
        """What a run saves that has consumed so many rows: the name of what decided them, and where planning goes on."""
        return self.plan.state(consumed_rows)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Errors: ValueError where the rows that were consumed would be others now."""
        self.plan.resume(state)

    def key(self, place: Place) -> str:
        return self.plan.table(*place[:3]).keys[place.number].decode(errors="replace")

    def documents(self, places: Sequence[Place]) -> list[TokenDocument]:
        """Read together: in a store, at the same time."""
        ranges, tables = list[tuple[store.Reader, int, int]](), list[Table]()
        for place in places:
            table, number = self.plan.table(*place[:3]), place.number
            shard = self.plan.orders[place.source].group(place.epoch, place.group).shards[table.shard[number]]
            reader = self._by_number[place.source].payload(shard)
            ranges.append((reader, int(table.offsets[number]), int(table.sizes[number])))
            tables.append(table)
        return [self._checked(content, table, place.number, reader.place) for content, table, place, (reader, _, _) in
                zip(store.gather(ranges), tables, places, ranges, strict=True)]

    def _checked(self, content: bytes | memoryview, table: Table, number: int, shard: str) -> TokenDocument:
        parts = slice(int(table.first_part[number]), int(table.first_part[number + 1]))
        try:
            doc = TokenDocument.from_bytes(content)
        except ValueError:
            doc = None
        if doc is None or doc.kinds != tuple(table.kinds[parts].tolist()) or doc.lengths != tuple(table.lengths[parts].tolist()):
            raise ValueError(f"sample {table.keys[number].decode(errors='replace')} of token shard {shard} is not what its index says: "
                             "the shard changed. Encode it again")
        return doc

    def sequence(self, doc: TokenDocument, place: Place, choice: Choice) -> TokenSequence:
        """A document as it is trained on."""
        vocab, given = self.vocab, self.config.given_weight
        if choice.task == INTERLEAVED:
            return sequence.interleaved(doc, vocab)
        if choice.task == CHAT:
            return sequence.chat(doc, vocab)
        if choice.task == DRAW:
            return sequence.draw(doc, None if choice.prompt < 0 else choice.prompt, vocab, given)
        key_hash = self.plan.table(*place[:3]).key_hash[place.number]
        order = question_order(self.config.seed, key_hash, place.epoch, doc.kinds.count(QUESTION))
        return sequence.describe(doc, order, choice.text_first, vocab, given, self.config.answer_weight)
