"""What is in a folder of shards, on one page to look at: documents of raw shards, or packed rows of token shards as a model is given them.

Rows come from the loader that training uses, so the page shows what is learned: every token, its loss weight, where documents end.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import raw_check, shards, show_page, tar
from data.check import holds_tokens
from data.config import DataConfig
from data.document import Document, texts_of
from data.images import to_uint8
from data.index import read_manifest
from data.loader import Loader, Row
from data.show_page import Token
from data.vocab import Vocab

MEASURED = 64
"""Rows whose tokens are counted."""
KINDS = {"t": "text", "c": "control", "i": "image codes", "p": "padding"}


def show(folder: Path, out: Path, config: DataConfig, *, rows: int = 4, documents: int = 24, raw: Path | None = None,
         tokenizer: Path | None = None, text: Path | None = None) -> Path:
    """Write a page about a folder: `rows` packed rows of token shards under `config`, or `documents` of raw shards. → `out`

    raw: the shards that token shards were made of, to see originals; tokenizer, text: the models that made them, to see pictures and
    words instead of numbers. Errors: ValueError, FileNotFoundError."""
    page = _tokens(folder, config, rows, raw, tokenizer, text) if holds_tokens(folder) else _raw(folder, config.prefix, documents)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        file.writelines(page)
    return out


# Raw shards -------------------------------------------------------------------------------------------------------

def _raw(folder: Path, prefix: str, count: int) -> Iterator[str]:
    """The first documents of shards spread over the folder."""
    paths = shards.find(folder, prefix)
    chosen = paths[::-(-len(paths) // max(count, 1))]
    each = -(-count // len(chosen))
    found: list[tuple[Path, str, Document | str]] = []
    for path in chosen:
        for sample in islice(shards.samples(path), each):
            key = str(sample["__key__"])
            try:
                found.append((path, key, shards.document_of(sample)))
            except ValueError as error:
                found.append((path, key, str(error)))
    good = [document for _, _, document in found if isinstance(document, Document)]
    pictures = sum(isinstance(part, bytes) for document in good for part in document.parts)
    numbers = [(f"{len(paths):,}", "raw shards"), (f"{sum(path.stat().st_size for path in paths) / 1e6:,.1f} MB", "of tars"),
               (f"{len(found):,}", "documents shown"), (f"{pictures:,}", "pictures in them"),
               (f"{sum(bool(document.roles) for document in good):,}", "conversations among them")]
    about = f"<code>{escape(str(folder))}</code>: the first documents of {len(chosen):,} shards."
    yield show_page.opening("mmllm raw shards", about, numbers)
    yield show_page.histogram([len(text) for document in good for text in texts_of(document)], "characters a text")
    for path in chosen:
        yield f"<h2>{escape(path.name)}</h2><div class=grid>"
        for _, key, document in (one for one in found if one[0] == path):
            yield show_page.document(document) if isinstance(document, Document) else show_page.refused(key, document)
        yield "</div>"


def _originals(folder: Path, keys: Sequence[str]) -> dict[str, Document]:
    """Documents of raw shards by key; those that are not there, or are none, are left out."""
    wanted, found = set(keys), dict[str, Document]()
    for path in shards.find(folder):
        with tar.opened(path) as content:
            for sample in raw_check.grouped(tar.salvaged(content)[0])[0]:
                if sample.key in wanted:
                    wanted.remove(sample.key)
                    files = {name: content[m.first:m.first + m.size] for name, m in sample.members.items()}
                    with suppress(ValueError):
                        found[sample.key] = shards.document_of({"__key__": sample.key, **files})
        if not wanted:
            break
    return found


# Token shards -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Reader:
    """What ids mean, as far as their tokenizers are given."""

    vocab: Vocab
    piece: Callable[[int], str] | None
    """Of a text id."""
    decode: Callable[[NDArray[np.int32]], np.ndarray] | None
    """Codes [M, h, w] → picture, uint8 [H, W, 3]."""

    def token(self, id: int, weight: float) -> Token:
        vocab = self.vocab
        if id >= vocab.text_size:
            return Token(id, "i" if id >= vocab.first_image else "c", vocab.token_name(id), weight)
        return Token(id, "t", self.piece(id).replace("▁", " ") if self.piece else str(id), weight)

    def sequence(self, ids: Sequence[int], weights: Sequence[float]) -> str:
        """Tokens of one document; the codes of each picture folded."""
        tokens = [self.token(id, weight) for id, weight in zip(ids, weights, strict=True)]
        out: list[str] = []
        at = 0
        while at < len(tokens):
            end = at
            while end < len(tokens) and tokens[end].kind == "i":
                end += 1
            if end > at:
                out.append(show_page.coded(tokens[at:end], self._picture(ids[at - 1] if at else 0, ids[at:end])))
            else:
                out.append(show_page.span(tokens[at]))
            at = max(end, at + 1)
        return "".join(out)

    def _picture(self, grid_id: int, codes: Sequence[int]) -> np.ndarray | None:
        grids = {self.vocab.grid(*grid): grid for grid in self.vocab.grids}
        if self.decode is None or grid_id not in grids:
            return None
        try:
            return self.decode(self.vocab.codes(codes, *grids[grid_id]))
        except ValueError:  # codes of another book, which `mmllm data check` names
            return None


def _reader(vocab: Vocab, tokenizer: Path | None, text: Path | None) -> tuple[Reader, str | None]:
    """With the fingerprint of the tokenizers, where both are given."""
    from data.encode import fingerprint
    from tokenizer.model import VisualTokenizer
    from tokenizer.text import TextTokenizer

    said = TextTokenizer.load(text) if text is not None else None
    visual = VisualTokenizer.load(tokenizer) if tokenizer is not None else None
    if said is not None and said.size != vocab.text_size:
        raise ValueError(f"{text} has {said.size:,} pieces, the token shards were made with {vocab.text_size:,}: name the text.model that "
                         "made them")
    if visual is not None and (visual.codebook_size, visual.num_books) != (vocab.codebook_size, vocab.num_books):
        raise ValueError(f"{tokenizer} has {visual.num_books} books of {visual.codebook_size:,} codes, the token shards were made with "
                         f"{vocab.num_books} of {vocab.codebook_size:,}: name the visual tokenizer that made them")

    def decode(codes: NDArray[np.int32]) -> np.ndarray:
        import torch

        assert visual is not None
        _, h, w = codes.shape
        patches = (visual.patch_size * scale for scale in visual.scales)
        scale = next(scale for scale, patch in zip(visual.scales, patches, strict=True) if (h * patch, w * patch) in visual.sizes)
        return to_uint8(visual.decode(torch.from_numpy(codes)[None], scale))[0]

    piece: Any = said.processor.id_to_piece if said is not None else None
    name = fingerprint(visual.fingerprint, said.fingerprint, vocab) if visual is not None and said is not None else None
    return Reader(vocab, piece, decode if visual is not None else None), name


def weights_of(row: Row) -> NDArray[np.float32]:
    """[s] loss weight of predicting each token of a row; 0 for the first of a document, which nothing predicts."""
    weights = np.concatenate([[0], row.loss_weight[:-1]]).astype(np.float32)
    weights[row.cu_seqlens[:-1]] = 0
    return weights


def _tokens(folder: Path, config: DataConfig, count: int, raw: Path | None, tokenizer: Path | None, text: Path | None) -> Iterator[str]:
    manifest = read_manifest(folder)
    vocab = Vocab.of(manifest["vocab"])
    reader, name = _reader(vocab, tokenizer, text)
    loader = Loader(replace(config, shards=folder), name)
    measured = [loader.row(number) for number in range(max(count, MEASURED))]
    lengths = [int(n) for row in measured for n in np.diff(row.cu_seqlens)[:len(row.keys)]]
    used = sum(lengths) / (len(measured) * config.row_len)
    numbers = [(f"{manifest['documents']:,}", "documents"), (f"{manifest['image_codes'] + manifest['text_ids']:,}", "ids in shards"),
               (f"{vocab.size:,}", "vocabulary"), (f"{used:.2%}", f"of {len(measured)} rows is filled"),
               (f"{len(lengths) / len(measured):.1f}", "documents a row")]
    about = (f"<code>{escape(str(folder))}</code> ({loader.fingerprint}): rows of {config.row_len:,} tokens, seed {config.seed}, plan "
             f"{loader.state(0)['plan_hash']}.")
    yield show_page.opening("mmllm token shards", about, numbers)
    yield _counts(measured, vocab) + show_page.histogram(lengths, "tokens a document")
    originals = _originals(raw, [key for row in measured[:count] for key in row.keys]) if raw is not None else {}
    yield "<h2>Rows</h2>" + show_page.LEGEND
    for number, row in enumerate(measured[:count]):
        sizes = np.diff(row.cu_seqlens)[:len(row.keys)].tolist()
        yield (f"<div class=row><h3>Row {number}: {len(row.keys)} documents, {sum(sizes):,} of {config.row_len:,} tokens</h3>"
               + show_page.filling(sizes, config.row_len))
        weights = weights_of(row)
        for key, first, size in zip(row.keys, row.cu_seqlens.tolist(), sizes, strict=False):
            ids = row.tokens[first:first + size].tolist()
            original = show_page.document(originals[key], folded=True) if key in originals else ""
            yield show_page.sequence(key, size, reader.sequence(ids, weights[first:first + size].tolist()), original, ids[0] != vocab.bos)
        yield "</div>"


def _counts(rows: Sequence[Row], vocab: Vocab) -> str:
    """A table: tokens by what they are, and how many of them are learned from."""
    total, learned, weight = Counter[str](), Counter[str](), dict.fromkeys(KINDS, 0.0)
    for row in rows:
        end, weights = int(row.cu_seqlens[len(row.keys)]), weights_of(row)
        kinds = np.where(row.tokens < vocab.text_size, "t", np.where(row.tokens < vocab.first_image, "c", "i"))
        kinds[end:] = "p"
        for kind in KINDS:
            mine = weights[kinds == kind]
            total[kind] += len(mine)
            learned[kind] += int((mine > 0).sum())
            weight[kind] += float(mine.sum())
    whole = max(total.total(), 1)
    return show_page.table(["", "tokens", "share", "learned from", "loss weight"],
                           [[name, f"{total[kind]:,}", f"{total[kind] / whole:.2%}", f"{learned[kind]:,}", f"{weight[kind]:,.0f}"]
                            for kind, name in KINDS.items()])
