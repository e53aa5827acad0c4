"""Samples of any tar: what can be read of it, and what is wrong with the rest.

Our own shards are refused where they are damaged (data/shards.py); what people bring is taken as far as it is whole.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from data import tar
from data.document import Document
from data.formats.piece import PICTURES, Piece, Refusal

META = re.compile(r"(^|/)(__[^/]*__($|/)|\._)")
"""Members about a tar, not in it, and those that macOS adds."""
FIRST_DOT, LAST_DOT = range(2)
"""Where a key ends: webdataset's and Energon's rule, or for those who put dots into names, where nothing else than pictures, texts and
labels matters."""
MATTERS = (*PICTURES, "txt", "json", "cls")
Sample = dict[str, bytes | str]


def documents(piece: Piece, make: Callable[[Sample], Document], ends: int = FIRST_DOT) -> Iterator[Document | Refusal]:
    """Make a document of each sample of a tar."""
    for sample in samples(piece, ends):
        if isinstance(sample, Refusal):
            yield sample
            continue
        key = str(sample["__key__"])
        try:
            yield replace(make(sample), key=key)
        except ValueError as error:
            yield Refusal(key, error)


def samples(piece: Piece, ends: int = FIRST_DOT) -> Iterator[Sample | Refusal]:
    """Neighbouring members that share a key, as webdataset groups them; damage is a refusal of its own."""
    try:
        with tar.opened(piece.path) as content:
            members, damage = tar.salvaged(content)
            sample: Sample = {}
            for member in members:
                place = tar.key_of(member.name, last_dot=ends == LAST_DOT)
                if place is None or META.search(member.name):
                    continue
                key, extension = place[0], place[1].lower()
                if ends == LAST_DOT and extension not in MATTERS:
                    continue
                if ends == LAST_DOT and extension == "json" and sample and key.startswith(f"{sample['__key__']}."):
                    continue  # KEY.more.json, beside KEY.jpg
                if sample and sample["__key__"] != key:
                    yield _checked(sample)
                    sample = {}
                sample.setdefault("__key__", key)
                if extension in sample:
                    sample["__twice__"] = extension
                sample[extension] = content[member.first:member.first + member.size]
            if sample:
                yield _checked(sample)
    except ValueError as error:  # an empty file
        damage = [str(error)]
    for words in damage:
        yield Refusal(piece.path.name, ValueError(f"damaged tar: {words}"))


def _checked(sample: Sample) -> Sample | Refusal:
    if "__twice__" not in sample:
        return sample
    return Refusal(str(sample["__key__"]), ValueError(f"duplicate name: two members .{sample['__twice__']}"))
