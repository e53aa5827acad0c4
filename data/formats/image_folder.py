"""A folder of pictures by class, CLASS/x.jpg: torchvision's ImageFolder.

The class is the first folder below the source, its number that folder's place among them, its name the folder's, `_` a blank, unless
class names are given."""

from collections.abc import Iterator
from pathlib import Path

from data.document import Document
from data.formats.album import Album
from data.formats.classes import class_names
from data.formats.piece import PICTURES, Piece, Refusal, files, slices
from data.formats.reading import Reading


def pieces(source: Path) -> list[Piece]:
    return slices(source, [[path] for path in files(source, *PICTURES)]) if source.is_dir() else []


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    names = class_names(reading.classes, piece.source)
    folders = {name: number for number, name in enumerate(sorted(path.name for path in piece.source.iterdir() if path.is_dir()))}
    for path in piece.files:
        name = path.relative_to(piece.source).as_posix()
        folder = name.partition("/")[0] if "/" in name else ""
        try:
            if not folder:
                raise ValueError("picture without a label: it lies in no class's folder")
            number, words = names.get(folder, (folders[folder], folder.replace("_", " ").strip()))
            if names and folder not in names:
                raise ValueError(f"unknown class: folder {folder!r} is none of those named")
            yield Document(name, (album.take(path.read_bytes()), words), meta={"label": number})
        except ValueError as error:
            yield Refusal(name, error)
