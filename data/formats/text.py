"""Plain text: a field of jsonl, a column of parquet, or a document a txt file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.document import Document
from data.formats import rows
from data.formats.album import Album
from data.formats.piece import Piece, Refusal, files, slices
from data.formats.reading import Reading, chosen, decoded, said

COLUMNS = {"text": ("text", "content", "raw_content", "document")}


def pieces(source: Path) -> list[Piece]:
    return rows.pieces(source) + slices(source, [[path] for path in files(source, "txt")])


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    if not piece.files:
        found = chosen(reading, rows.names(piece.path), COLUMNS, piece.within)["text"]

        def make(row: dict[str, Any], name: str) -> Document:
            return Document("", (said(row.get(found), found),))

        yield from rows.documents(piece, make, (found,))
        return
    for path in piece.files:
        name = path.name if path == piece.source else path.relative_to(piece.source).as_posix()
        try:
            if (size := path.stat().st_size) > rows.LINE_BYTES:
                raise ValueError(f"text too long: {size:,} bytes, over {rows.LINE_BYTES:,}: write its documents as jsonl")
            yield Document(name, (decoded(path.read_bytes(), "the file"),))
        except ValueError as error:
            yield Refusal(name, error)
