"""Raw shards read as if they had been encoded: each becomes a token shard in a temporary folder when a row needs it.

For small runs and trials. The ids are those that `mmllm data encode` gives, because it is the same code; every rank and every worker
encodes for itself what it reads, which is what encoding once before training saves.
"""

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import index, shards, store, tar
from data.choices import Table
from data.encode import fingerprint, vocab_of
from data.mixture import Source
from data.order import Group
from data.plan import Listed
from data.tokens import Encoding, encode_shards
from tokenizer.model import VisualTokenizer
from tokenizer.text import TextTokenizer


class OnlineShards:
    """Stands where `data.loader.Shards` does."""

    def __init__(self, source: Source, visual: Path, text: Path) -> None:
        self.paths = shards.find(Path(source.shards), source.prefix)
        self.names = [path.name for path in self.paths]
        self._visual, self._text = VisualTokenizer.load(visual), TextTokenizer.load(text)
        self.vocab = vocab_of(self._visual, self._text)
        self.fingerprint = fingerprint(self._visual.fingerprint, self._text.fingerprint, self.vocab)
        self._home = tempfile.TemporaryDirectory(prefix="mmllm-online-")
        self._target = lru_cache(None)(self._encoded)
        self.payload = lru_cache(None)(self._payload)

    def plan(self) -> Listed:
        counts, hashes = list[int](), list[str]()
        for path in self.paths:
            with tar.opened(path) as content:
                hashes.append(f"{hashlib.sha256(content).hexdigest()[:16]} {self.fingerprint}")
            counts.append(sum("json" in sample for sample in shards.samples(path)))
        first = index.read_index(self._target(0))
        return Listed(np.array(counts), round(first.lengths.sum() / max(len(first.keys), 1) * sum(counts)), hashes, self.table)

    def table(self, group: Group) -> Table:
        return Table.join([index.read_index(self._target(number), self.fingerprint) for number in group.shards])

    def _payload(self, number: int) -> store.Reader:
        return store.open(self._target(number))

    def _encoded(self, number: int) -> Path:
        folder = Path(self._home.name) / str(os.getpid())  # workers that were forked write beside each other
        folder.mkdir(exist_ok=True)
        target = folder / self.names[number]
        work = [(self.paths[number], target)]
        for _ in encode_shards(work, self._visual, self._text, self.vocab, self.fingerprint, Encoding()):
            pass
        return target
