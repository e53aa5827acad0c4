"""OpenAI's messages: `messages: [{"role": "user", "content": …}, …]`, content a string or a list of parts.

    {"type": "text", "text": …}                        also input_text, output_text
    {"type": "image_url", "image_url": {"url": …}}     a data: URL, file:// or a path; also input_image
    {"type": "image"}                                  the next of the row's `images`, as transformers' chat templates have it
"""

from collections.abc import Iterator
from typing import Any

from data.document import Document, Role
from data.formats import rows
from data.formats.album import Album
from data.formats.piece import Piece, Refusal
from data.formats.reading import Reading, listed
from data.formats.turns import conversation, named, role_of

pieces = rows.pieces


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    def make(row: dict[str, Any], name: str) -> Document:
        more = row.get("images") or []
        if not isinstance(more, list):
            raise ValueError(f"no images: it is {type(more).__name__}, not a list")
        images = iter(more)
        turns = list[tuple[Role, list[str | bytes]]]()
        for message in listed(row, "messages"):
            if not isinstance(message, dict):
                raise ValueError(f"no conversation: a message is {type(message).__name__}")
            content = message.get("content")
            parts = [content] if isinstance(content, str) else content
            if not isinstance(parts, list):
                raise ValueError(f"no conversation: the content of a message is {type(content).__name__}")
            turns.append((role_of(message.get("role")), [_part(part, images, album) for part in parts]))
        if left := len(list(images)):
            raise ValueError(f"images count: {left} of {len(more)} are in no message")
        return conversation(turns, named(row, "id"))

    yield from rows.documents(piece, make)


def _part(part: Any, images: Iterator[object], album: Album) -> str | bytes:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in ("text", "input_text", "output_text"):
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError(f"no text: a part's text is {type(text).__name__}")
        return text
    if kind in ("image_url", "input_image"):
        value = part.get("image_url")
        return album.take(value.get("url") if isinstance(value, dict) else value)
    if kind == "image":
        value = next((part[name] for name in ("image", "url", "path") if part.get(name) is not None), None)
        if value is None and (value := next(images, None)) is None:
            raise ValueError("images count: a message has a picture more than images")
        return album.take(value)
    raise ValueError(f"unknown part: of type {kind!r}")
