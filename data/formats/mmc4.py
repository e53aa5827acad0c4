"""MMC4: sentences, and pictures that are each matched to one of them (Zhu et al. 2023, arXiv:2304.06939, section 3).

A picture stands before its sentence, as most do on the page; the sentences between two pictures are one text. `image_name` is the
file's, in a folder or in image shards."""

from collections.abc import Iterator
from typing import Any

from data.document import Document
from data.formats import rows
from data.formats.album import Album
from data.formats.piece import Piece, Refusal
from data.formats.reading import Reading, listed

pieces = rows.pieces


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    def make(row: dict[str, Any], name: str) -> Document:
        sentences, before = listed(row, "text_list"), dict[int, list[bytes]]()
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError("no text: text_list holds what is no string")
        similarity = list[object]()
        for info in listed(row, "image_info"):
            at = info.get("matched_text_index") if isinstance(info, dict) else None
            if not isinstance(at, int) or not 0 <= at < len(sentences):
                raise ValueError(f"no place for a picture: matched_text_index is {at!r} of {len(sentences)} sentences")
            picture = album.take_or_drop(info.get("image_name") or info.get("raw_url"), name)
            if picture is not None:
                before.setdefault(at, []).append(picture)
                similarity.append(info.get("matched_sim"))
        parts, words = list[str | bytes](), list[str]()
        for at, sentence in enumerate(sentences):
            if at in before:
                parts += [" ".join(words)] if words else []
                parts += before[at]
                words = []
            words += [sentence.strip()] if sentence.strip() else []
        parts += [" ".join(words)] if words else []
        if not parts:
            raise ValueError("empty document: no text, and no picture that is there")
        meta: dict[str, object] = {"url": row["url"]} if isinstance(row.get("url"), str) else {}
        return Document("", tuple(parts), meta={**meta, "matched_sim": similarity})

    yield from rows.documents(piece, make, ("text_list", "image_info", "url"))
