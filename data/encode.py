"""Raw shards → token shards: every picture becomes codes and every text ids, once, before training.

    train-000000.tar        KEY.ids: one `TokenDocument` a sample
    train-000000.idx.npz    where each sample lies, and kinds and lengths of its parts: what a plan needs without payload
    manifest.json           counts, vocabulary, and the fingerprint of both tokenizers

A shard is written beside its place and renamed; its index follows, so a shard with an index is whole and is not encoded
again after an interruption. The manifest comes last.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data import shards
from data.document import ANSWER, CAPTION, GRAMMAR_VERSION, IMAGE, QUESTION, TEXT, Document, TokenDocument
from data.images import fit, load_image, to_tensor
from data.index import index_path, read_index, write_index
from data.vocab import Vocab
from tokenizer.text import TextTokenizer


class ImageEncoder(Protocol):
    """What is asked of a visual tokenizer here; `tokenizer.model.VisualTokenizer` is one."""

    @property
    def image_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode(self, images: torch.Tensor) -> torch.Tensor: ...


def fingerprint(visual: str, text: str, vocab: Vocab) -> str:
    """One name for everything that decides an id: both tokenizers, the id ranges and the grammar. 16 hex digits."""
    return hashlib.sha256(f"{visual} {text} {vocab} {GRAMMAR_VERSION}".encode()).hexdigest()[:16]


def token_document(document: Document, codes: Sequence[NDArray[np.int32]], vocab: Vocab,
                   text: TextTokenizer) -> TokenDocument:
    """One document as ids; `codes` are those of its pictures, in order."""
    pictures = iter(codes)
    pieces: list[tuple[int, tuple[int, int], NDArray[np.int64]]] = []

    def add(kind: int, words: str) -> None:
        pieces.append((kind, (0, 0), np.array(text.encode(words), np.int64)))

    for part in document.parts:
        if isinstance(part, str):
            add(TEXT, part)
        else:
            picture = next(pictures)
            pieces.append((IMAGE, (picture.shape[1], picture.shape[2]), vocab.image_ids(picture)))
    for caption in document.captions:
        add(CAPTION, caption)
    for question, answer in document.questions:
        add(QUESTION, question)
        add(ANSWER, answer)
    ids = np.concatenate([piece[2] for piece in pieces]).astype(np.int32)
    return TokenDocument(tuple(p[0] for p in pieces), tuple(p[1] for p in pieces), tuple(len(p[2]) for p in pieces), ids)


def encode_shard(source: Path, target: Path, visual: ImageEncoder, text: TextTokenizer, vocab: Vocab,
                 batch_len: int = 256) -> None:
    """Encode one raw shard and index it. Errors: ValueError that names shard, key and picture."""
    documents: list[Document] = []
    pictures: list[NDArray[np.uint8]] = []
    for document in shards.read(source):
        documents.append(document)
        for part in document.parts:
            if isinstance(part, bytes):
                try:
                    pictures.append(np.asarray(fit(load_image(part), visual.image_size)))
                except ValueError as error:
                    raise ValueError(f"{source}: sample {document.key}: {error}") from error
    codes = [row for first in range(0, len(pictures), batch_len)
             for row in visual.encode(to_tensor(np.stack(pictures[first:first + batch_len]))).cpu().numpy()]
    samples: list[dict[str, object]] = []
    tokens: list[TokenDocument] = []
    used = 0
    for document in documents:
        count = sum(isinstance(part, bytes) for part in document.parts)
        tokens.append(token_document(document, codes[used:used + count], vocab, text))
        samples.append({"__key__": document.key, "ids": tokens[-1].to_bytes()})
        used += count
    shards.write_tar(target, samples)
    write_index(target, tokens)


def encode(source: Sequence[Path], folder: Path, visual: ImageEncoder, text: TextTokenizer, vocab: Vocab,
           progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Encode raw shards into `folder`, which may hold some already. → the manifest."""
    name = fingerprint(visual.fingerprint, text.fingerprint, vocab)
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "fingerprint"
    if marker.exists() and marker.read_text() != name:
        raise ValueError(f"{folder} holds shards of fingerprint {marker.read_text()}, not {name}: "
                         "the tokenizer or the vocabulary changed. Encode into another folder, or remove this one")
    marker.write_text(name)
    targets = [folder / path.name for path in source]
    for done, (path, target) in enumerate(zip(source, targets, strict=True)):
        if not index_path(target).exists():
            encode_shard(path, target, visual, text, vocab)
        progress(done + 1, len(targets))
    return write_manifest(folder, targets, name, vocab)


def write_manifest(folder: Path, targets: Sequence[Path], name: str, vocab: Vocab) -> Path:
    indexes = [read_index(target) for target in targets]
    kinds = np.concatenate([index.kinds for index in indexes])
    lengths = np.concatenate([index.lengths for index in indexes])
    manifest = {
        "fingerprint": name, "grammar_version": GRAMMAR_VERSION,
        "vocab": {**vocab.__dict__, "size": vocab.size},
        "documents": sum(len(index.keys) for index in indexes),
        "images": int((kinds == IMAGE).sum()),
        "image_codes": int(lengths[kinds == IMAGE].sum()),
        "text_ids": int(lengths[kinds != IMAGE].sum()),
        "captions": int((kinds == CAPTION).sum()), "questions": int((kinds == QUESTION).sum()),
        "shards": {target.name: {"documents": len(index.keys), "bytes": target.stat().st_size,
                                 "index": hashlib.sha256(index_path(target).read_bytes()).hexdigest()[:16]}
                   for target, index in zip(targets, indexes, strict=True)},
    }
    path = folder / "manifest.json"
    partial = path.with_name("manifest.json.partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.rename(path)
    return path
