"""Pictures with captions, as img2dataset writes them: KEY.jpg with KEY.txt or with KEY.json that has "caption", in tars or in a folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.document import Document
from data.formats import tars
from data.formats.album import Album
from data.formats.piece import PICTURES, Piece, Refusal, files, slices, whole
from data.formats.reading import Reading, decoded, said


def pieces(source: Path) -> list[Piece]:
    return whole(source, "tar") or slices(source, list(_stems(source, files(source, *PICTURES, "txt", "json")).values()))


def read(piece: Piece, reading: Reading, album: Album) -> Iterator[Document | Refusal]:
    if piece.path.name.endswith(".tar"):
        yield from tars.documents(piece, lambda sample: _pair(sample, album), tars.LAST_DOT)
        return
    for stem, found in _stems(piece.source, piece.files).items():
        try:
            if len(found) > len(set(map(_kind, found))):
                raise ValueError(f"duplicate name: {', '.join(path.name for path in found)}")
            yield _pair({path.suffix[1:].lower(): path.read_bytes() for path in found}, album, stem)
        except ValueError as error:
            yield Refusal(stem, error)


def _stems(source: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """{path without its extension: the picture and texts that have it}. A json without picture or text is none."""
    stems: dict[str, list[Path]] = {}
    for path in paths if source.is_dir() else ():
        stems.setdefault(path.relative_to(source).with_suffix("").as_posix(), []).append(path)
    return {stem: found for stem, found in stems.items() if any(path.suffix.lower() != ".json" for path in found)}


def _kind(path: Path) -> str:
    extension = path.suffix[1:].lower()
    return "picture" if extension in PICTURES else extension


def _pair(sample: Mapping[str, bytes | str], album: Album, key: str = "") -> Document:
    picture = next((sample[extension] for extension in PICTURES if extension in sample), None)
    if picture is None:
        raise ValueError("caption without a picture")
    if "txt" in sample:
        words = decoded(sample["txt"], "its caption") if sample["txt"].strip() else ""
    else:
        words = _caption(sample.get("json", b""))
    if not words:
        raise ValueError("picture without a caption")
    return Document(key, (album.take(picture), words))


def _caption(record: bytes | str) -> str:
    try:
        return said(json.loads(record)["caption"], "its caption")
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
