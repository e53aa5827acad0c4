"""Raw shards as ours, which are Energon's interleaved samples: KEY.json with `texts` and `images`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.document import Document
from data.formats import tars
from data.formats.album import Album
from data.formats.piece import Piece, Refusal, whole
from data.formats.reading import Reading
from data.shards import document_of


def pieces(source: Path) -> list[Piece]:
    return whole(source, "tar")


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    def make(sample: tars.Sample) -> Document:
        document = document_of(sample)
        lasting = document.roles or document.captions or document.questions  # which speak of a picture that must be there
        parts = [part if isinstance(part, str) else album.take(part) if lasting
                 else album.take_or_drop(part, f"{piece.within}/{document.key}") for part in document.parts]
        if not (left := tuple(part for part in parts if part is not None)):
            raise ValueError("empty document: no text, and no picture that is there")
        return replace(document, parts=left)

    yield from tars.documents(piece, make)
