"""Class-labelled shards: KEY.jpg with KEY.cls, which holds a class's number or name, as webdataset's ImageNet.

A document is the picture and the class's name; its number is `meta["label"]`."""

from collections.abc import Iterator
from pathlib import Path

from data.document import Document
from data.formats import tars
from data.formats.album import Album
from data.formats.classes import USUAL, class_names
from data.formats.piece import PICTURES, Piece, Refusal, whole
from data.formats.reading import Reading, decoded


def pieces(source: Path) -> list[Piece]:
    return whole(source, "tar")


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    names = class_names(reading.classes, piece.source)
    if not names:
        raise ValueError(f"{piece.source} says a number for a class, not its name: give classes, a file with a name a line, or put "
                         f"{' or '.join(USUAL[:2])} there")

    def make(sample: tars.Sample) -> Document:
        picture = next((sample[extension] for extension in PICTURES if extension in sample), None)
        if picture is None:
            raise ValueError("label without a picture")
        if "cls" not in sample:
            raise ValueError("picture without a label")
        label = decoded(sample["cls"], "its label")
        if label not in names:
            raise ValueError(f"unknown class: {label[:60]!r} is none of the {len(set(names.values()))} named")
        number, name = names[label]
        return Document("", (album.take(picture), name), meta={"label": number})

    yield from tars.documents(piece, make, tars.LAST_DOT)
