"""Image edits: a picture, what is to be done to it, and the picture after: a conversation of one exchange.

Columns as InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800), UltraEdit (Zhao et al. 2024, arXiv:2407.05282) and MagicBrush (Zhang
et al. 2023, arXiv:2306.10012) name them."""

from collections.abc import Iterator
from typing import Any

from data.document import Document
from data.formats import rows
from data.formats.album import Album
from data.formats.piece import Piece, Refusal
from data.formats.reading import Reading, chosen, said
from data.formats.turns import conversation

COLUMNS = {"source": ("original_image", "source_image", "source_img", "source", "input_image"),
           "instruction": ("edit_prompt", "instruction", "edit", "edit_instruction", "prompt"),
           "target": ("edited_image", "target_image", "target_img", "target", "output_image")}

pieces = rows.pieces


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    found = chosen(reading, rows.names(piece.path), COLUMNS, piece.within)

    def make(row: dict[str, Any], name: str) -> Document:
        before, instruction, after = (row.get(found[meaning]) for meaning in COLUMNS)
        asked = [album.take(before), said(instruction, found["instruction"])]
        return conversation([("user", asked), ("assistant", [album.take(after)])], {})

    yield from rows.documents(piece, make, tuple(found.values()))
