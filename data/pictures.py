"""Every picture of a source, whatever it is: a folder of photographs, img2dataset's tars or raw shards.

Captions are not needed, so a folder of one's own will do. A *label* names a picture's class, where the source has classes:

    a folder        the sub-folder that the picture lies in (CLASS/x.jpg)
    tars            KEY.cls, or a field of KEY.json
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data import shards
from data.formats.piece import PICTURES


class Picture(NamedTuple):
    name: str
    """Path in the folder, or tar/key.member."""
    file: bytes
    label: str | None


def tars(source: Path, prefix: str | None = None) -> list[Path]:
    """The tars of a source whose names start with `prefix`; without one, held-out shards (seen-*) where there are any, else all."""
    found = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar"))
    if prefix is None:
        return [path for path in found if path.name.startswith("seen-")] or found
    chosen = [path for path in found if path.name.startswith(prefix)]
    if found and not chosen:
        raise FileNotFoundError(f"{source} holds no tar named {prefix}*: give --prefix the start of one, such as {found[0].name}")
    return chosen


def pictures(source: Path, prefix: str | None = None, label: str = "meta.label") -> Iterator[Picture]:
    """In order of name. `label`: where KEY.json holds the class, keys and list numbers joined by dots. Errors: FileNotFoundError for a
    source without pictures."""
    found = _files(source)
    for tar in tars(source, prefix):
        for sample in shards.samples(tar):
            for name, file in sample.items():
                if isinstance(file, bytes) and name.rpartition(".")[2] in PICTURES:
                    yield Picture(f"{tar.name}/{sample['__key__']}.{name}", file, _label(sample, label))
    for path in found:
        parts = path.relative_to(source).parts
        yield Picture("/".join(parts), path.read_bytes(), parts[0] if len(parts) > 1 else None)


def count(source: Path, prefix: str | None = None) -> int:
    """How many pictures there are, from names alone. Errors: those of `pictures`, and ValueError for what is no tar."""
    total = len(_files(source))
    for path in tars(source, prefix):
        try:
            with tarfile.open(path) as tar:
                total += sum(member.name.rpartition(".")[2].lower() in PICTURES for member in tar if member.isfile())
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no tar: {error}. Write it again, or remove it") from error
    return total


def _files(source: Path) -> list[Path]:
    """Picture files of a folder without tars."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name a folder of pictures or of tars")
    if tars(source):
        return []
    found = sorted(path for path in source.rglob("*") if path.suffix[1:].lower() in PICTURES and path.is_file())
    if not found:
        raise FileNotFoundError(f"{source} holds no picture ({', '.join(PICTURES)}) and no tar")
    return found


def _label(sample: dict[str, bytes | str], field: str) -> str | None:
    if isinstance(named := sample.get("cls"), bytes):
        return named.decode(errors="replace").strip()
    try:
        value: Any = json.loads(sample["json"])
        for key in field.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return str(value) if isinstance(value, (str, int)) else None
