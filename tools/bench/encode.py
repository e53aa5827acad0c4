"""Pictures a second of the encoding loop, with one process and with two, beside a plain loop that reads a shard, decodes all of
it, encodes it in batches of 256 and writes it, one thing after another, as the first version did.

    OMP_NUM_THREADS=1 python tools/bench/encode.py [--documents 8192] [--repeats 3] [--tokenizer FOLDER --text FILE]

Scenes of the quick start under a tokenizer of its size (random weights where none is given: they cost the same). Torch has one
thread in each process, so that loops are compared and not matrix products; "cores" are those the processes may run on. Wall
time says what a user waits, on a machine that has nothing else to do; CPU seconds say what it costs on any.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import io
import json
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from data import shards
from data.document import ANSWER, CAPTION, IMAGE, QUESTION, TEXT, TokenDocument, texts_of
from data.encode import encode, vocab_of
from data.images import fit, to_tensor
from data.index import read_index
from data.scenes import shards as scene_shards
from data.vocab import Vocab
from tokenizer import text as texts
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.quantize import TextEmbedding
from tokenizer.text import TextTokenizer


def plain(source: Path, target: Path, visual: VisualTokenizer, text: TextTokenizer, vocab: Vocab) -> None:
    """One shard the plain way."""
    documents: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    with source.open("rb") as stream:
        for sample in group_by_keys(tar_file_expander([{"url": str(source), "stream": stream}])):
            record = json.loads(sample["json"])
            documents.append({**record, "key": sample["__key__"]})
            for name in record["images"]:
                if name is not None:
                    picture = Image.open(io.BytesIO(sample[name]))
                    picture.load()
                    pictures.append(np.asarray(fit(picture.convert("RGB"), visual.image_size)))
    codes = [row for first in range(0, len(pictures), 256)
             for row in visual.encode(to_tensor(np.stack(pictures[first:first + 256]))).numpy()]
    coded = iter(codes)
    tokens: list[TokenDocument] = []
    with target.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for record in documents:
            pieces: list[tuple[int, tuple[int, int], np.ndarray]] = []
            for words in record["texts"]:
                if words is None:
                    picture = next(coded)
                    pieces.append((IMAGE, picture.shape[1:], vocab.image_ids(picture)))
                else:
                    pieces.append((TEXT, (0, 0), np.array(text.encode(words), np.int64)))
            said = [(CAPTION, words) for words in record.get("captions", ())]
            said += [each for q, a in record.get("questions", ()) for each in ((QUESTION, q), (ANSWER, a))]
            pieces += [(kind, (0, 0), np.array(text.encode(words), np.int64)) for kind, words in said]
            ids = np.concatenate([piece[2] for piece in pieces]).astype(np.int32)
            tokens.append(TokenDocument(tuple(p[0] for p in pieces), tuple(p[1] for p in pieces), tuple(len(p[2]) for p in pieces), ids))
            tar.write({"__key__": record["key"], "ids": tokens[-1].to_bytes()})
    with tarfile.open(target) as tar:
        members = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    np.savez(target.with_suffix(".idx.npz"), keys=np.array([m[0] for m in members]), offsets=np.array([m[1:] for m in members]),
             first_part=np.cumsum([0] + [len(t.kinds) for t in tokens]), kinds=np.array([k for t in tokens for k in t.kinds], np.int8),
             lengths=np.array([n for t in tokens for n in t.lengths], np.int32))


Way = Callable[[Callable[[int, int, Mapping[str, float]], None]], object]
"""Encodes the shards and tells how it goes."""


def measured(run: Way, cores: int, pictures: int) -> tuple[float, float]:
    """→ pictures a second of wall time since the first batch, and of CPU time."""
    every = os.sched_getaffinity(0)
    if len(every) < cores:
        raise ValueError(f"this needs {cores} cores, and there are {len(every)}")
    os.sched_setaffinity(0, sorted(every)[:cores])
    told: dict[str, float] = {}
    began, spent = time.perf_counter(), cpu_s()
    run(lambda done, total, measures: told.update(measures))
    os.sched_setaffinity(0, every)
    return told.get("images/s") or pictures / (time.perf_counter() - began), pictures / (cpu_s() - spent)


def cpu_s() -> float:
    """Seconds of this process and of those it started that have ended."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="visual tokenizer, a folder")
    parser.add_argument("--text", type=Path, help="text.model file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene_shards.write(folder / "raw", level=1, seed=0, train=options.documents, held=1, shard_len=1024)
        source = shards.find(folder / "raw", "train-")
        text_path, visual_path = options.text or folder / "text.model", options.tokenizer or folder / "visual"
        if options.text is None:
            texts.train([words for document in shards.read(source[0]) for words in texts_of(document)], 512).save(text_path)
        text = TextTokenizer.load(text_path)
        if options.tokenizer is None:
            torch.manual_seed(0)
            VisualTokenizer(TokenizerConfig(), TextEmbedding(torch.randn(text.size, 128), torch.arange(text.size), 128)).save(visual_path)
        visual = VisualTokenizer.load(visual_path)
        vocab = vocab_of(visual, text)
        outs = (folder / f"out{i}" for i in range(10**6))

        def plainly(_: object) -> None:
            out = next(outs)
            out.mkdir()
            for path in source:
                plain(path, out / path.name, visual, text, vocab)

        def ours(processes: int) -> Way:
            tools = (visual, text) if processes == 1 else (visual_path, text_path)
            return lambda tell: encode(source, next(outs), *tools, vocab, tell, processes=processes)

        encode(source, folder / "once", visual, text, vocab)
        pictures = sum(int((read_index(folder / "once" / path.name).kinds == IMAGE).sum()) for path in source)
        plain(source[0], folder / "plain.tar", visual, text, vocab)
        assert (folder / "plain.tar").read_bytes() == (folder / "once" / source[0].name).read_bytes(), "the loops write different ids"
        ways = {"plain loop, 1 core": (plainly, 1), "1 process, 1 core": (ours(1), 1), "plain loop, 2 cores": (plainly, 2),
                "1 process, 2 cores": (ours(1), 2), "2 processes, 2 cores": (ours(2), 2)}
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(options.repeats):  # in turn, so that a busy minute of the machine meets them all
            for way, (run, cores) in ways.items():
                found[way].append(measured(run, cores, pictures))
    wall, cpu = ({way: median(pair[i] for pair in pairs) for way, pairs in found.items()} for i in range(2))
    report: dict[str, Any] = {
        "images/s": {way: round(rate) for way, rate in wall.items()},
        "images a CPU second": {way: round(rate) for way, rate in cpu.items()},
        "over the plain loop": {"1 core": round(wall["1 process, 1 core"] / wall["plain loop, 1 core"], 2),
                                "2 cores": round(wall["1 process, 2 cores"] / wall["plain loop, 2 cores"], 2),
                                "CPU": round(cpu["1 process, 1 core"] / cpu["plain loop, 1 core"], 2)},
        "two processes over one": {"a core each": round(wall["2 processes, 2 cores"] / wall["1 process, 1 core"], 2),
                                   "both cores": round(wall["2 processes, 2 cores"] / wall["1 process, 2 cores"], 2)},
        "pictures": pictures, "repeats": options.repeats, "load": [round(x, 1) for x in os.getloadavg()],
        "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
