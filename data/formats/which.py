"""Which format a source has: by name, or by what is there."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data.document import Document
from data.formats import (
    edits,
    image_folder,
    interleaved,
    labels,
    llava,
    messages,
    mmc4,
    obelics,
    pairs,
    rows,
    table,
    tars,
    text,
)
from data.formats.album import Album
from data.formats.classes import USUAL
from data.formats.piece import PICTURES, Piece, Refusal, files, whole
from data.formats.reading import Reading, column


class Format(NamedTuple):
    about: str
    pieces: Callable[[Path], list[Piece]]
    read: Callable[[Piece, Reading, Album], Iterator[Document | Refusal]]
    """Documents whose key is their name in the piece."""


FORMATS: dict[str, Format] = {
    "pairs": Format("pictures with captions, in tars or a folder (img2dataset)", pairs.pieces, pairs.read),
    "table": Format("rows of a picture and a caption (parquet, jsonl)", table.pieces, table.read),
    "interleaved": Format("raw shards, ours or Energon's interleaved", interleaved.pieces, interleaved.read),
    "obelics": Format("rows of parallel images and texts", obelics.pieces, obelics.read),
    "mmc4": Format("rows of sentences with matched pictures", mmc4.pieces, mmc4.read),
    "llava": Format("LLaVA's conversations", llava.pieces, llava.read),
    "messages": Format("OpenAI's messages", messages.pieces, messages.read),
    "text": Format("plain text", text.pieces, text.read),
    "labels": Format("tars of pictures with class labels", labels.pieces, labels.read),
    "folders": Format("pictures in a folder a class", image_folder.pieces, image_folder.read),
    "edits": Format("rows of picture, instruction, picture", edits.pieces, edits.read),
}


def recognised(source: Path, reading: Reading) -> tuple[str, str]:
    """(format, why) of what a source holds. Errors: ValueError or FileNotFoundError for nothing that is known."""
    if found := whole(source, "tar"):
        return _of_tar(found[0])
    pictures = {path.with_suffix("") for path in files(source, *PICTURES)}
    texts = [path for path in files(source, "txt", "json") if path.with_suffix("") in pictures]
    if texts:
        return "pairs", f"{texts[0].name} lies beside a picture of its name"
    if listed := [path for path in files(source, *rows.ENDINGS) if path.name not in USUAL]:
        return _of_rows(listed[0], reading)
    if any(path.parent != source for path in pictures):
        return "folders", "pictures lie in folders, without texts"
    if found := files(source, "txt"):
        return "text", f"{found[0].name} and no picture"
    raise FileNotFoundError(f"{source} holds no picture ({', '.join(PICTURES)}) with a caption (txt) or in a class's folder, no tar, "
                            f"and no {', '.join(rows.ENDINGS)} or txt file")


def _of_tar(piece: Piece) -> tuple[str, str]:
    first = next((sample for sample in islice(tars.samples(piece), 100) if not isinstance(sample, Refusal)), None)
    if first is None:
        raise ValueError(f"{piece.path} holds no whole sample: say which format this is, or remove it")
    held = ", ".join(name for name in first if name[0] != "_")
    record = first.get("json", b"")
    if isinstance(record, bytes) and b'"texts"' in record and b'"images"' in record:
        return "interleaved", f"{piece.within} holds samples of {held}, with texts and images"
    return ("labels" if "cls" in first else "pairs"), f"{piece.within} holds samples of {held}"


def _of_rows(path: Path, reading: Reading) -> tuple[str, str]:
    names = rows.names(path)
    why = f"{path.name} has {', '.join(names) or 'nothing that can be read'}"
    for name, needed in (("llava", {"conversations"}), ("messages", {"messages"}), ("mmc4", {"text_list", "image_info"}),
                         ("obelics", {"images", "texts"})):
        if needed <= set(names):
            return name, why
    for name, columns in (("edits", edits.COLUMNS), ("table", table.COLUMNS), ("text", text.COLUMNS)):
        if all(column(reading, names, meaning, usual) for meaning, usual in columns.items()):
            return name, why
    raise ValueError(f"{why}, which tells no format: name it with format, one of {', '.join(FORMATS)}, and its fields with columns")
