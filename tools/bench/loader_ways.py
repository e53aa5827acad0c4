"""The loaders that loader.py measures: ours, webdataset and Energon, each as packed rows of token shards and a way to save where it is.

What belongs to another loader is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch

from data import sequence, shards
from data.config import DataConfig
from data.document import TokenDocument
from data.index import read_manifest
from data.loader import Loader, Row, assemble
from data.sequence import TokenSequence
from data.vocab import Vocab

ROW_LEN = 8192
WINDOW = 1024
"""Documents that are looked at to fill a row: our window, Energon's packing buffer."""
VOCAB = Vocab(32_000, 32_768, 1, ((16, 16),))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A loader at work."""

    rows: Iterator[Row]
    """Without end."""
    save: Callable[[Path, int], int]
    """(file, rows consumed) → rows that the saved state stands behind."""


@dataclass(frozen=True, kw_only=True)
class Way:
    open: Callable[[Path, Path | None, int], Run]
    """(folder of token shards, saved state, worker processes)"""
    needs: tuple[str, ...] = ()
    workers: int = 0


# Ours -------------------------------------------------------------------------------------------------------------

def ours(folder: Path, state: Path | None, workers: int) -> Run:
    loader, first, documents = Loader(DataConfig(shards=folder, row_len=ROW_LEN, window=WINDOW)), 0, 0
    if state is not None:
        saved = json.loads(state.read_text())
        loader.resume(saved)
        first = saved["consumed_rows"]

    def save(path: Path, consumed: int) -> int:
        half = sum(listed["documents"] for listed in read_manifest(folder)["shards"].values()) // 2
        consumed = max(consumed, half * consumed // max(documents, 1))
        path.write_text(json.dumps(loader.state(consumed)))
        return consumed

    def rows() -> Iterator[Row]:
        nonlocal documents
        for number in count(first):
            row = loader.row(number)
            documents += len(row.keys)
            yield row

    return Run(rows=rows(), save=save)


# Theirs -----------------------------------------------------------------------------------------------------------

def sequence_of(payload: bytes) -> TokenSequence:
    return sequence.interleaved(TokenDocument.from_bytes(payload), VOCAB)


def webdataset(folder: Path, state: Path | None, workers: int) -> Run:
    wds: Any = import_module("webdataset")
    stateful: Any = import_module("torchdata.stateful_dataloader")

    def packed(samples: Iterator[dict[str, Any]]) -> Iterator[Row]:
        waiting, length, keys = list[TokenSequence](), 0, list[str]()
        for sample in samples:
            one = sequence_of(sample["ids"])
            if length + len(one.ids) > ROW_LEN:
                yield assemble(waiting, tuple(keys), ROW_LEN, VOCAB.pad)
                waiting, length, keys = [], 0, []
            waiting.append(one)
            keys.append(sample["__key__"])
            length += len(one.ids)

    urls = [str(path) for path in shards.find(folder, "train")]
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=0).compose(wds.detshuffle(1000)).repeat().compose(packed)
    loader = stateful.StatefulDataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=lambda row: row)
    if state is not None:
        loader.load_state_dict(torch.load(state, weights_only=False))

    def save(path: Path, consumed: int) -> int:
        torch.save(loader.state_dict(), path)
        return consumed

    return Run(rows=iter(loader), save=save)


def energon(folder: Path, state: Path | None, workers: int) -> Run:
    en: Any = import_module("megatron.energon")

    @en.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**en.basic_sample_keys(sample), "sequence": sequence_of(sample["ids"])}

    class Encoder(en.DefaultTaskEncoder):
        cookers = (en.Cooker(cook),)
        decoder = None

        @en.stateless
        def encode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
            return sample

        def select_samples_to_pack(self, samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
            groups, length = [list[dict[str, Any]]()], 0
            for sample in sorted(samples, key=lambda sample: len(sample["sequence"].ids)):
                if groups[-1] and length + len(sample["sequence"].ids) > ROW_LEN:
                    groups.append([])
                    length = 0
                groups[-1].append(sample)
                length += len(sample["sequence"].ids)
            return groups

        @en.stateless
        def pack_selected_samples(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
            keys = tuple(sample["__key__"] for sample in samples)
            row = assemble([sample["sequence"] for sample in samples], keys, ROW_LEN, VOCAB.pad)
            return {"__key__": keys[0], "__restore_key__": (), "row": row}

    loader = en.get_savable_loader(en.get_train_dataset(
        folder, worker_config=en.WorkerConfig(rank=0, world_size=1, num_workers=workers), task_encoder=Encoder(), batch_size=None,
        shuffle_buffer_size=100, max_samples_per_sequence=100, packing_buffer_size=WINDOW))
    if state is not None:
        loader.restore_state_rank(torch.load(state, weights_only=False))

    def save(path: Path, consumed: int) -> int:
        torch.save(loader.save_state_rank(), path)
        return consumed

    return Run(rows=(packed["row"] for packed in loader), save=save)


WAYS = {
    "ours": Way(open=ours),
    "webdataset": Way(open=webdataset, needs=("webdataset", "torchdata")),
    "energon": Way(open=energon, needs=("megatron-energon",)),
    "energon, 1 worker": Way(open=energon, needs=("megatron-energon",), workers=1),
    "energon, 2 workers": Way(open=energon, needs=("megatron-energon",), workers=2),
}
