"""Token shards → packed rows, in an order that is a pure function of the recipe.

Row n depends on seed, token shards and settings, not on who asks: ranks take slices of the same endless list of rows, so
the data order survives any change of width. The state of a run is `{plan_hash, consumed_rows}`.

Letters: s tokens in a row, d documents in it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import document as docs
from data.document import ANSWER, CAPTION, IMAGE, QUESTION, TEXT, TokenDocument, TokenSequence, uniform
from data.index import Index, read_index, read_manifest
from data.packing import pack
from data.vocab import Vocab

PLAN_VERSION = 1
SALT_TASK, SALT_CAPTION, SALT_DROP, SALT_FIRST, SALT_QUESTION = range(5)  # and on, a question each


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which token shards, and how their documents become rows."""

    shards: Path
    """Folder of token shards with its manifest.json."""
    prefix: str = "train"
    """Shards whose name starts so."""
    row_len: int = 2048
    """s: tokens in a packed row."""
    seed: int = 0
    """Order of documents and every choice a document needs."""
    draw_ratio: float = 0.6
    """Share of picture–text pairs trained text → image; the others are described and asked about."""
    describe_first: float = 0.5
    """Share of described documents whose text comes before the questions; in the others it comes behind them."""
    drop_text: float = 0.1
    """Share of text → image documents whose text is dropped, for guidance."""
    window: int = 256
    """Documents looked at to fill the end of a row."""


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
    for sequence in sequences:
        end = at + len(sequence.ids)
        tokens[at:end] = sequence.ids
        labels[at:end - 1] = sequence.ids[1:]
        weight[at:end - 1] = sequence.loss_weight[1:]
        borders.append(end)
        at = end
    if at < row_len:
        borders.append(row_len)
    return Row(tokens, labels, weight, np.array(borders, np.int32), keys)


class Loader:
    """Rows by number. Errors: ValueError or FileNotFoundError that names a shard, a fingerprint or a document."""

    def __init__(self, config: DataConfig, fingerprint: str | None = None) -> None:
        """`fingerprint`: that of the tokenizers in use; shards made by others are refused."""
        manifest = read_manifest(config.shards)
        if fingerprint is not None and manifest["fingerprint"] != fingerprint:
            raise ValueError(f"token shards in {config.shards} were encoded under fingerprint {manifest['fingerprint']}, "
                             f"the tokenizers in use have {fingerprint}: encode the shards again with them")
        self.config = config
        self.vocab = Vocab.of(manifest["vocab"])
        self.row_len = config.row_len
        self.fingerprint = str(manifest["fingerprint"])
        listed: dict[str, dict[str, object]] = manifest["shards"]
        paths = sorted(config.shards / name for name in listed if name.startswith(config.prefix))
        if not paths:
            raise FileNotFoundError(f"{config.shards} lists no shard named {config.prefix}*.tar")
        for path in paths:
            if not path.is_file() or path.stat().st_size != listed[path.name]["bytes"]:
                raise ValueError(f"token shard {path} is missing or not the one in the manifest: encode it again")
        self._maps = [np.memmap(path, np.uint8, "r") for path in paths]
        self.table = Table.join([read_index(path, self.fingerprint) for path in paths])
        settings = {k: v for k, v in asdict(config).items() if k != "shards"}
        name = json.dumps([PLAN_VERSION, self.fingerprint, settings, [listed[p.name]["index"] for p in paths]])
        self.plan_hash = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._epochs: list[list[NDArray[np.int64]]] = []  # of each planned epoch: documents of each row

    def __len__(self) -> int:
        """Documents."""
        return len(self.table.keys)

    def document(self, number: int) -> TokenDocument:
        table = self.table
        first = int(table.offsets[number])
        return TokenDocument.from_bytes(self._maps[table.shard[number]][first:first + int(table.sizes[number])].data)

    def row(self, number: int) -> Row:
        """Row `number`, 0 …, of the endless list."""
        epoch = 0
        while number >= len(self._rows(epoch)):
            number -= len(self._rows(epoch))
            epoch += 1
        members = self._rows(epoch)[number]
        return assemble([self.sequence(int(i), epoch) for i in members],
                        tuple(str(self.table.keys[i]) for i in members), self.row_len, self.vocab.pad)

    def _rows(self, epoch: int) -> list[NDArray[np.int64]]:
        while len(self._epochs) <= epoch:
            number = len(self._epochs)
            order = np.random.default_rng((self.config.seed, number)).permutation(len(self))
            lengths = self.table.sequence_lengths(self.config, number)[order]
            try:
                rows = pack(lengths.tolist(), self.row_len, self.config.window)
            except ValueError as error:
                worst = self.table.keys[order[int(lengths.argmax())]]
                raise ValueError(f"sample {worst}: {error}") from error
            self._epochs.append([order[row] for row in rows])
        return self._epochs[epoch]

    def sequence(self, number: int, epoch: int) -> TokenSequence:
        """Document `number` as it is trained on in `epoch`."""
        table, config = self.table, self.config
        doc, one = self.document(number), table.key_hash[number:number + 1]
        task = int(table.tasks(config, epoch, number)[0])
        if task == docs.INTERLEAVED:
            return docs.interleaved(doc, self.vocab)
        if task == docs.DRAW:
            dropped = uniform(config.seed, one, epoch, SALT_DROP)[0] < config.drop_text
            prompts = [i for i, kind in enumerate(doc.kinds) if kind in (TEXT, CAPTION)]
            choice = int(uniform(config.seed, one, epoch, SALT_CAPTION)[0] * len(prompts))
            return docs.draw(doc, None if dropped else prompts[choice], self.vocab)
        count = doc.kinds.count(QUESTION)
        order = np.argsort([uniform(config.seed, one, epoch, SALT_QUESTION + i)[0] for i in range(count)])
        first = count == 0 or uniform(config.seed, one, epoch, SALT_FIRST)[0] < config.describe_first
        return docs.describe(doc, order.tolist(), bool(first), self.vocab)


@dataclass(frozen=True)
class Table:
    """The indexes of all shards, joined; what each document is and how long its parts are."""

    keys: NDArray[np.str_]
    shard: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    first_part: NDArray[np.int64]
    kinds: NDArray[np.int8]
    lengths: NDArray[np.int32]
    key_hash: NDArray[np.uint64]
    is_pair: NDArray[np.bool_]
    """One picture with a text: may be drawn or described. Everything else is read in order."""

    @classmethod
    def join(cls, indexes: list[Index]) -> "Table":
        starts = np.cumsum([0] + [len(index.kinds) for index in indexes])
        first_part = np.concatenate([index.first_part[:-1] + start for index, start in zip(indexes, starts, strict=False)]
                                    + [starts[-1:]])
        keys = np.concatenate([index.keys for index in indexes])
        kinds = np.concatenate([index.kinds for index in indexes])
        digests = b"".join(hashlib.blake2b(str(key).encode(), digest_size=8).digest() for key in keys)
        count = lambda kind: np.add.reduceat((kinds == kind).astype(np.int64), first_part[:-1])  # noqa: E731
        return cls(keys=keys, shard=np.repeat(np.arange(len(indexes), dtype=np.int32), [len(i.keys) for i in indexes]),
                   offsets=np.concatenate([index.offsets for index in indexes]),
                   sizes=np.concatenate([index.sizes for index in indexes]), first_part=first_part, kinds=kinds,
                   lengths=np.concatenate([index.lengths for index in indexes]),
                   key_hash=np.frombuffer(digests, "<u8"), is_pair=(count(IMAGE) == 1) & (count(TEXT) == 1))

    def tasks(self, config: DataConfig, epoch: int, number: int | None = None) -> NDArray[np.int64]:
        """What each document (or one) is trained as in an epoch."""
        which = slice(None) if number is None else slice(number, number + 1)
        drawn = uniform(config.seed, self.key_hash[which], epoch, SALT_TASK) < config.draw_ratio
        return np.where(self.is_pair[which], np.where(drawn, docs.DRAW, docs.DESCRIBE), docs.INTERLEAVED)

    def sequence_lengths(self, config: DataConfig, epoch: int) -> NDArray[np.int64]:
        """Tokens of each document's sequence in an epoch, from the index alone."""
        total = lambda *kinds: np.add.reduceat(np.where(np.isin(self.kinds, kinds), self.lengths, 0),  # noqa: E731
                                               self.first_part[:-1])
        count = lambda *kinds: np.add.reduceat(np.isin(self.kinds, kinds).astype(np.int64),  # noqa: E731
                                               self.first_part[:-1])
        pictures = total(IMAGE) + count(IMAGE) * docs.image_length(0)
        tasks = self.tasks(config, epoch)
        dropped = uniform(config.seed, self.key_hash, epoch, SALT_DROP) < config.drop_text
        prompts = count(TEXT, CAPTION)
        choice = (uniform(config.seed, self.key_hash, epoch, SALT_CAPTION) * prompts).astype(np.int64)
        prompt = np.isin(self.kinds, (TEXT, CAPTION))
        first = np.concatenate([[0], np.cumsum(prompts)[:-1]])
        prompt_lengths = np.append(self.lengths[prompt], 0)
        chosen = prompt_lengths[np.minimum(first + choice, len(prompt_lengths) - 1)]
        drawn = 2 + np.where(dropped, 0, chosen) + pictures
        first = (count(QUESTION) == 0) | (uniform(config.seed, self.key_hash, epoch, SALT_FIRST) < config.describe_first)
        described = 2 + pictures + total(TEXT, QUESTION, ANSWER) + 2 * (count(QUESTION) + ~first)
        read = 2 + pictures + total(TEXT)
        return np.select([tasks == docs.DRAW, tasks == docs.DESCRIBE], [drawn, described], read).astype(np.int64)
