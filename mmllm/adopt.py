"""A Hugging Face model → a checkpoint that `mmllm pretrain` starts from, its vocabulary extended by control tokens and image codes.

    *.distcp, .metadata, metadata.json, common.pt    megatron-core's distributed checkpoint: read under any layout of ranks
    state.json, manifest.json                        shape and vocabulary; files and hashes
    text.model, vocab.json, base.json                the text tokenizer to encode shards with, the id space, the base's config.json

Rows are placed by id. The base's T rows stay as they are, those beyond its tokenizer included; ours follow. A new row is the mean of the
rows that the base's tokenizer uses, and noise: its logit is then at most the average of all, so that text is about as likely as before
(Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). Three kinds start closer to what they mean: <bos> and <eos> as the base's
own, image codes that stand for words of this very base (a text-aligned table) as the mean of those words' rows, and rows that are given.

Letters: T base rows, n new ones, h hidden size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.encode import vocab_of
from data.vocab import Vocab
from mmllm import streams
from mmllm.config import Model
from mmllm.hf import replaced
from mmllm.hf_config import read_model
from mmllm.manifest import MANIFEST, STATE, entry
from mmllm.run import write_json
from mmllm.streams import Chunk, Chunked, Lazy
from mmllm.weights import EMBEDDING, HEAD, TABLES, import_weights
from tokenizer.model import VisualTokenizer
from tokenizer.quantize import SharedIndexQuantizer
from tokenizer.text import TextTokenizer

BASE = "base.json"
BLOCK = 1 << 21
"""Numbers of a table that are in memory at once: 8 MB as fp32."""


def adopt(base: Path, out: Path, visual_tokenizer: Path, init_rows: Path | None = None, noise: float = 0.1, seed: int = 0) -> Model:
    """Write `base` to `out` for the pictures of `visual_tokenizer`. → the shape that the recipe must name

    init_rows: a safetensors file of rows to start from, `ids` [n], `rows` [n, h] and for the output layer `output_rows` [n, h].
    noise: its standard deviation in those of the base's rows, column by column. Errors: ValueError, FileNotFoundError; one line each."""
    if not (base / "config.json").is_file():
        raise FileNotFoundError(f"{base} has no config.json: give a Hugging Face model folder")
    text = TextTokenizer.load(base)
    config = json.loads((base / "config.json").read_bytes())
    try:
        model = read_model(config)
        tensors = streams.read(base)
        weights = import_weights(tensors, model)
    except ValueError as error:
        raise ValueError(f"{base}: {error}") from error
    visual = VisualTokenizer.load(visual_tokenizer)
    vocab = vocab_of(visual, text)
    given = _given(init_rows, vocab, model) if init_rows is not None else None
    ends = {vocab.bos: config.get("bos_token_id"), vocab.eos: config.get("eos_token_id")}
    copies = {ours: int(theirs[0] if isinstance(theirs, list) else theirs) for ours, theirs in ends.items() if theirs not in (None, [])}
    rows = model.vocab_rows(vocab.size)
    for name in (EMBEDDING,) if model.tie_embeddings else (EMBEDDING, HEAD):
        if name not in tensors or tensors[name].shape != (text.size, model.hidden_size):
            found = list(tensors[name].shape) if name in tensors else "absent"
            raise ValueError(f"{base}: {name} is {found}, config.json asks for [{text.size}, {model.hidden_size}]")
        table = Table(name=name, read=streams.rows_of(base, name), rows=text.size, width=model.hidden_size, used=text.used)
        words = _words(visual, vocab, table) if name == EMBEDDING else {}
        blocks = new_blocks(table, copies, words, given, vocab, noise, seed, rows, tensors[name].dtype)
        weights[TABLES[name]] = Chunked((rows, model.hidden_size), tensors[name].dtype, blocks)
    with replaced(out, BASE) as folder:
        streams.write_checkpoint(folder, weights)
        text.save(folder / "text.model")
        vocab.save(folder / "vocab.json")
        shutil.copyfile(base / "config.json", folder / BASE)
        write_json(folder / STATE, {"step": 0, "recipe": {"model": asdict(model)}, "vocab_size": vocab.size})
        files = {path.name: entry(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {"step": 0, "files": files})
    return model


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Table:
    """A vocabulary's table of the base: input embedding or output layer."""

    name: str
    read: Callable[[int, int], Tensor]
    """(first, end) → rows [end - first, h]"""
    rows: int
    """T"""
    width: int
    """h"""
    used: int
    """Rows that the base's tokenizer can ask for: [0, used). The others were never trained."""

    @property
    def block(self) -> int:
        """Rows read at once."""
        return max(1, BLOCK // self.width)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one pass over a table finds."""

    mean: Tensor
    """[h] of the rows in use"""
    std: Tensor
    """[h]"""
    rows: dict[int, Tensor]
    """Those asked for, by id: [h] each"""
    checksum: str
    """As tokenizer/text_rows.py names an embedding."""


def survey(table: Table, wanted: Collection[int]) -> Survey:
    """Read a table once, block by block."""
    total, square = torch.zeros(2, table.width, dtype=torch.float64)
    digest, found = hashlib.sha256(), dict[int, Tensor]()
    asked = torch.tensor(sorted(wanted), dtype=torch.int64)
    for first in range(0, table.rows, table.block):
        end = min(first + table.block, table.rows)
        rows = table.read(first, end).contiguous()
        digest.update(rows.view(torch.uint8).numpy().data)
        mine = rows[:max(0, table.used - first)].float()
        total += mine.sum(0, dtype=torch.float64)
        square += mine.square().sum(0, dtype=torch.float64)
        for i in asked[(asked >= first) & (asked < end)].tolist():
            found[i] = rows[i - first].float()
    mean = total / table.used
    std = (square / table.used - mean.square()).clamp_min(0).sqrt()
    return Survey(mean=mean.float(), std=std.float(), rows=found, checksum=digest.hexdigest()[:16])


def new_blocks(table: Table, copies: dict[int, int], words: dict[int, list[int]], given: dict[str, Tensor] | None, vocab: Vocab,
               noise: float, seed: int, rows: int, dtype: torch.dtype) -> list[Chunk]:
    """A table extended to `rows`, in blocks. Ids that start otherwise than at the mean: copies of a base id's row, and the mean of those
    of several base ids, words."""
    wanted = {*copies.values(), *(i for ids in words.values() for i in ids)}
    found = survey(table, wanted)
    if missing := sorted(wanted - found.rows.keys()):
        raise ValueError(f"{table.name} has {table.rows:,} rows, none for id {missing[0]:,} that config.json or the visual tokenizer names")
    placed = {ours: found.rows[theirs] for ours, theirs in copies.items()}
    if given is not None:
        placed |= zip(given["ids"].tolist(), given.get("output_rows" if table.name == HEAD else "rows", given["rows"]), strict=True)

    def make(first: int, end: int) -> Tensor:
        out = torch.zeros(end - first, table.width)
        new = max(first, vocab.text_size)
        if first < vocab.text_size:
            out[:vocab.text_size - first] = table.read(first, min(end, vocab.text_size)).float()
        label = hashlib.sha256(f"{seed} {table.name} {new}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(label[:7], "big"))
        for i in range(new, min(end, vocab.size)):
            around = noise * found.std * torch.randn(table.width, generator=generator)
            start = torch.stack([found.rows[j] for j in words[i]]).mean(0) if i in words else found.mean
            out[i - first] = placed[i].float() if i in placed else start + around
        return out.to(dtype)
    spans = [(first, min(first + table.block, rows)) for first in range(0, rows, table.block)]
    return [Chunk((first, 0), Lazy((end - first, table.width), dtype, partial(make, first, end))) for first, end in spans]


def _words(visual: VisualTokenizer, vocab: Vocab, table: Table) -> dict[int, list[int]]:
    """Image code's id → ids of the base's words it stands for; empty unless the table of the pictures was made of this embedding."""
    quantizer, text = visual.quantizer, visual.text
    if text is None or not text.checksum or not isinstance(quantizer, SharedIndexQuantizer) or text.checksum != survey(table, ()).checksum:
        return {}
    books = [(book, words) for book in range(visual.num_books) if (words := quantizer.words(book)) is not None]
    return {vocab.first_image + book * vocab.codebook_size + code: ids for book, words in books for code, ids in enumerate(words.tolist())}


def _given(path: Path, vocab: Vocab, model: Model) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"init_rows: there is no file {path}")
    found: dict[str, Any] = load_file(path)
    ids, rows = found.get("ids"), found.get("rows")
    if ids is None or rows is None or rows.shape != (len(ids), model.hidden_size) or found.get("output_rows", rows).shape != rows.shape:
        raise ValueError(f"{path} holds { {name: list(tensor.shape) for name, tensor in found.items()} }: needed are ids [n] and rows "
                         f"[n, {model.hidden_size}], and output_rows alike if any")
    if len(ids) and not vocab.text_size <= int(ids.min()) <= int(ids.max()) < vocab.size:
        raise ValueError(f"{path} has rows for ids {int(ids.min()):,} to {int(ids.max()):,}; new are [{vocab.text_size:,}, {vocab.size:,})")
    return found
