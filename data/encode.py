"""Raw shards → token shards: every picture becomes codes and every text ids, once, before training.

    train-000000.tar        KEY.ids: one `TokenDocument` a sample
    train-000000.idx.npz    where each sample lies, kinds and lengths of its parts, and the fingerprint of what made it
    manifest.json           counts, vocabulary, and the fingerprint of both tokenizers

A shard is written beside its place and renamed; its index follows, so a shard with an index is whole and is not encoded
again after an interruption. The manifest comes last.

Shard i of the list belongs to process i mod n, whatever is there already: processes, and machines that share nothing but the
folders, need neither a lock nor a word between them.
"""

import hashlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import torch

from data.document import CAPTION, IMAGE, QUESTION, ROLE
from data.files import write_json, written
from data.images import ANY, Limits
from data.index import index_path, read_index
from data.sequence import GRAMMAR_VERSION
from data.skipped import Skipped
from data.tokens import Encoding, ImageEncoder, encode_shards
from data.vocab import Vocab
from tokenizer.model import VisualTokenizer
from tokenizer.text import TextTokenizer

Tell = Callable[[int, int, Mapping[str, float]], None]
"""Told (shards done, shards, {"images/s": …}) after every batch."""


def vocab_of(visual: VisualTokenizer, text: TextTokenizer) -> Vocab:
    """The id space of two tokenizers."""
    return Vocab(text.size, visual.codebook_size, visual.num_books, visual.grids)


def fingerprint(visual: str, text: str, vocab: Vocab) -> str:
    """One name for everything that decides an id: both tokenizers, the id ranges and the grammar. 16 hex digits."""
    return hashlib.sha256(f"{visual} {text} {vocab} {GRAMMAR_VERSION}".encode()).hexdigest()[:16]


def encode(source: Sequence[Path], folder: Path, visual: ImageEncoder | Path, text: TextTokenizer | Path, vocab: Vocab,
           progress: Tell = lambda done, total, measures: None, *, processes: int = 1, max_bad: float = 0.0, batch_len: int = 256,
           limits: Limits = ANY, scale: int = 1, node: tuple[int, int] = (0, 1)) -> Path:
    """Encode raw shards into `folder`, which may hold some already. → the manifest.

    Tokenizers given as paths are loaded, by each of several `processes` for itself, onto a GPU where there is one; objects are used
    where they are. `node` (i, n): this machine is number i of n that encode into one folder, and the last of them to end writes
    the manifest. Of each shard's documents a share `max_bad` may be left out. Errors: ValueError, FileNotFoundError;
    ProcessFailed where one of several broke or was killed."""
    if processes < 1 or not 0 <= node[0] < node[1]:
        raise ValueError(f"processes is {processes} and node {node}: there is at least one process, and node i of n has 0 <= i < n")
    paths = (visual, text) if isinstance(visual, Path) and isinstance(text, Path) else None
    if processes > 1 and paths is None:
        raise ValueError(f"each of {processes} processes loads the tokenizers itself: give their paths instead of the objects")
    if len({path.name for path in source}) < len(source):
        raise ValueError(f"of {len(source)} raw shards some have the same name, as their token shards would: encode a folder at a time")
    encoder = _loaded(visual, 0 if processes == 1 else None) if isinstance(visual, Path) else visual
    said = TextTokenizer.load(text) if isinstance(text, Path) else text
    name = fingerprint(encoder.fingerprint, said.fingerprint, vocab)
    _claim(folder, name if scale == 1 else f"{name} at scale {scale}")
    work = [(path, folder / path.name) for path in source]
    mine = work[node[0]::node[1]]
    whole = [target for _, target in mine if index_path(target).exists()]
    for target in whole:
        read_index(target, name)  # or it is refused
    how = Encoding(batch_len=batch_len, max_bad=max_bad, limits=limits, scale=scale)
    if paths is None or processes == 1:
        steps = encode_shards(_missing(mine), encoder, said, vocab, name, how)
    else:
        threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // processes))
        steps = _on_processes([EncodeJob(work=_missing(mine[number::processes]), visual=paths[0], text=paths[1], vocab=vocab,
                                         fingerprint=name, how=how, number=number, threads=threads) for number in range(processes)])
    done, pictures, began = len(whole), 0, 0.0
    progress(done, len(mine), {})
    for count, shards in steps:
        pictures += count if began else 0  # the first batch warms up
        began, done = began or time.perf_counter(), done + shards
        progress(done, len(mine), {"images/s": pictures / max(time.perf_counter() - began, 1e-6)})
    return write_manifest(folder, [target for _, target in work], name, vocab)


def _claim(folder: Path, name: str) -> None:
    """Mark the folder as one of these tokenizers. Errors: ValueError where it belongs to others."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "fingerprint"
    if marker.exists() and marker.read_text() != name:
        raise ValueError(f"{folder} holds shards of fingerprint {marker.read_text()}, not {name}: "
                         "the tokenizer or the vocabulary changed. Encode into another folder, or remove this one")
    if not marker.exists():
        with written(marker, by_many=True) as beside:
            beside.write_text(name)


def _missing(work: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """What has an index is whole."""
    return [(source, target) for source, target in work if not index_path(target).exists()]


def _loaded(visual: Path, number: int | None) -> VisualTokenizer:
    """On the GPU of process `number`, where there is one; products and convolutions in full fp32."""
    model = VisualTokenizer.load(visual)
    if number is None or not torch.cuda.is_available():
        return model
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return model.to(f"cuda:{number % torch.cuda.device_count()}")


# Several processes ------------------------------------------------------------------------------------------------

class ProcessFailed(RuntimeError):
    """An encoding process ended with an error that is no fault of the input, or without a word."""


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What a process needs to know."""

    work: Sequence[tuple[Path, Path]]
    """(raw shard, token shard) that are its own."""
    visual: Path
    text: Path
    """Tokenizers, which it loads itself."""
    vocab: Vocab
    fingerprint: str
    """What they must have."""
    how: Encoding
    number: int
    """Of the process."""
    threads: int
    """That torch may use: the processes share the cores."""


def _on_processes(jobs: Sequence[EncodeJob]) -> Iterator[tuple[int, int]]:
    """Run the jobs on a process each. Yields what each has done since it last said so. The first that fails ends the others."""
    context = multiprocessing.get_context("spawn")  # a fork takes torch's threads along as if they still ran
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for job in jobs:
            ours, theirs = context.Pipe(duplex=False)
            workers[ours] = worker = context.Process(target=_work, args=(job, theirs), daemon=True)
            worker.start()
            theirs.close()
        running = dict(workers)
        while running:
            for link in wait_for_any(list(running)):
                assert isinstance(link, Connection)
                try:
                    said = link.recv()
                except EOFError:
                    worker = running.pop(link)
                    worker.join()
                    if worker.exitcode:
                        raise ProcessFailed(f"an encoding process ended with exit code {worker.exitcode} and no word (killed? out of "
                                            "memory?): the same command goes on behind the shards that are whole") from None
                    continue
                if isinstance(said, Exception):
                    raise said
                yield said
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _work(job: EncodeJob, link: Connection) -> None:
    """A process's life. Its parent gone, it ends at its next word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the parent too, who ends us
    torch.set_num_threads(job.threads)
    try:
        visual, text = _loaded(job.visual, job.number), TextTokenizer.load(job.text)
        name = fingerprint(visual.fingerprint, text.fingerprint, job.vocab)
        if name != job.fingerprint:
            raise ValueError(f"{job.visual} or {job.text} changed while shards were encoded: fingerprint {name}, not {job.fingerprint}")
        for step in encode_shards(job.work, visual, text, job.vocab, name, job.how):
            link.send(step)
    except BrokenPipeError:
        return
    except (ValueError, FileNotFoundError) as error:
        link.send(error)
    except Exception:
        link.send(ProcessFailed(f"encoding process {job.number}:\n{traceback.format_exc()}"))


# The manifest -----------------------------------------------------------------------------------------------------

def write_manifest(folder: Path, targets: Sequence[Path], name: str, vocab: Vocab) -> Path:
    """Write what the folder holds, once all of it is there. → its path"""
    path = folder / "manifest.json"
    if not all(index_path(target).exists() for target in targets):
        return path  # other nodes are still at it
    indexes = [read_index(target, name) for target in targets]
    kinds = np.concatenate([index.kinds for index in indexes]) % ROLE
    lengths = np.concatenate([index.lengths for index in indexes])
    skipped = Skipped.joined(index.skipped for index in indexes)
    manifest = {
        "fingerprint": name, "grammar_version": GRAMMAR_VERSION,
        "vocab": {**vocab.__dict__, "size": vocab.size},
        "documents": sum(len(index.keys) for index in indexes),
        "skipped": dict(sorted(skipped.causes.items())),
        "images": int((kinds == IMAGE).sum()),
        "image_codes": int(lengths[kinds == IMAGE].sum()),
        "text_ids": int(lengths[kinds != IMAGE].sum()),
        "captions": int((kinds == CAPTION).sum()), "questions": int((kinds == QUESTION).sum()),
        "shards": {target.name: {"documents": len(index.keys), "bytes": target.stat().st_size,
                                 "index": hashlib.sha256(index_path(target).read_bytes()).hexdigest()[:16]}
                   for target, index in zip(targets, indexes, strict=True)},
    }
    write_json(path, manifest, by_many=True)
    return path
