"""Where a format's pictures are found: in the row, in a folder, or in image shards of one.

    bytes, {"bytes": …, "path": …}   in the row itself (Hugging Face datasets' image column)
    data:image/png;base64,…          in the row itself
    a path, file://…                 below the images folder and nowhere else: rows come from strangers
    a name, a URL                    a member of the tars there, by its name or its stem, or by the "url" in its KEY.json (img2dataset);
                                     or a file or member that is called by the hex MD5, SHA-1 or SHA-256 of the URL

The index of tars is three numbers a picture and a sorted hash of its names, made on the first look-up in a process.

Letters: n names.
"""

import base64
import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from numpy.typing import NDArray

from data import tar
from data.formats.keep import Keep, kept
from data.formats.piece import PICTURES, files
from data.index import hashed
from data.skipped import Skipped

HASHES = (hashlib.md5, hashlib.sha1, hashlib.sha256)
MAX_BYTES = 1 << 28
"""Of a picture file; what is larger is not read."""


class Album:
    """The pictures of a source, as they are to be kept."""

    def __init__(self, root: Path, keep: Keep, drop: bool = False) -> None:
        """root: the images folder. drop: a document goes on without a picture that is missing or refused, where it can."""
        self.root, self.keep, self.drop = root, keep, drop
        self.dropped = Skipped()
        """Pictures that documents went on without."""
        self.shelves: dict[bool, Shelf] = {}
        """Its image shards, by whether URLs are names there, once a picture was looked for in them."""

    def take(self, value: object) -> bytes:
        """A picture, whatever way a row names it. Errors: ValueError by cause."""
        try:
            return kept(self._bytes(value), self.keep)
        except OSError as error:
            raise ValueError(f"unreadable picture: {error}") from error

    def take_or_drop(self, value: object, name: str) -> bytes | None:
        """The same, None for one that the document `name` goes on without."""
        try:
            return self.take(value)
        except ValueError as error:
            if not self.drop:
                raise
            self.dropped.refuse(error, name)
            return None

    def _bytes(self, value: object) -> bytes:
        if isinstance(value, dict):
            if not {"bytes", "path"} & value.keys():
                raise ValueError(f"missing picture: an object with {', '.join(map(str, value))}, without bytes or path")
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise ValueError(f"missing picture: the row has {type(value).__name__ if value else repr(value)} for it")
        if value.startswith("data:"):
            return _of_data_url(value)
        scheme = value.partition("://")[0] if "://" in value else ""
        if scheme == "file":
            value, scheme = unquote(urlsplit(value).path), ""
        if scheme:
            return self._of_url(value)
        return self._of_file(_below(self.root, value))

    def _of_file(self, path: str) -> bytes:
        file = self.root / path
        if file.is_file():
            if (size := file.stat().st_size) > MAX_BYTES:
                raise ValueError(f"too large: {path} has {size:,} bytes, over {MAX_BYTES:,}")
            return file.read_bytes()
        for name in (path, f"/{path.rpartition('/')[2]}"):
            if (found := self._member(name, False)) is not None:
                return found
        raise ValueError(f"missing picture: {path} is not in {self.root}: set images to the folder, or the image shards, that hold it"
                         + self._damage())

    def _of_url(self, url: str) -> bytes:
        digests = [make(url.encode(errors="surrogatepass")).hexdigest() for make in HASHES]
        for name in (f"{digest}.{extension}" for digest in digests for extension in PICTURES):
            if (self.root / name).is_file():
                return self._of_file(name)
        for name in (url, *digests):
            if (found := self._member(name, True)) is not None:
                return found
        raise ValueError(f"picture not local: {url[:200]}: nothing is downloaded here; fetch it (img2dataset) and set images to its shards"
                         + self._damage())

    def _damage(self) -> str:
        damage = next(iter(self.shelves.values())).damage
        return f" ({len(damage)} faults in image shards: {damage[0]})" if damage else ""

    def _member(self, name: str, urls: bool) -> bytes | None:
        if urls not in self.shelves:
            self.shelves[urls] = _shelf(tuple((path, path.stat().st_mtime) for path in files(self.root, "tar")), urls)
        shelf = self.shelves[urls]
        hash_ = hashed([name.encode(errors="surrogatepass")])[0]
        at = int(np.searchsorted(shelf.hashes, hash_))
        if at == len(shelf.hashes) or shelf.hashes[at] != hash_:
            return None
        if not urls and at + 1 < len(shelf.hashes) and shelf.hashes[at + 1] == hash_:
            raise ValueError(f"ambiguous picture: several are called {name.removeprefix('/')} in the image shards of {self.root}")
        number, first, size = shelf.places[shelf.order[at]].tolist()
        with shelf.tars[number].open("rb") as file:
            file.seek(first)
            return file.read(min(size, MAX_BYTES))


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError(f"broken data URL: it begins {url[:40]!r} and holds no comma")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"broken data URL: {error}") from error


def _below(root: Path, path: str) -> str:
    """`path` as it lies below `root`. Links that lie there are the owner's and are followed. Errors: ValueError for a way out."""
    top = os.path.normpath(root)
    whole = os.path.normpath(os.path.join(top, path))  # noqa: PTH118
    if "\0" in path or len(path) > 4096 or not whole.startswith(top.rstrip(os.sep) + os.sep):
        raise ValueError(f"picture outside the folder: {path[:200]!r} leads out of {root}: set images to the folder that holds it")
    return os.path.relpath(whole, top)


class Shelf(NamedTuple):
    """Where the pictures of image shards lie."""

    tars: tuple[Path, ...]
    hashes: NDArray[np.uint64]
    """[n] of names, sorted"""
    order: NDArray[np.int64]
    """[n] the row in `places` that each name means"""
    places: NDArray[np.int64]
    """[pictures, 3] number of the tar, first byte, bytes"""
    damage: tuple[str, ...]
    """What is wrong with the tars, of which the rest is read."""


@lru_cache(maxsize=4)
def _shelf(found: tuple[tuple[Path, float], ...], urls: bool) -> Shelf:
    tars, damage = tuple(path for path, _ in found), list[str]()
    hashes, rows, places = list[NDArray[np.uint64]](), list[int](), list[tuple[int, int, int]]()
    for number, path in enumerate(tars):
        names = list[str]()
        try:
            with tar.opened(path) as content:
                members, faults = tar.salvaged(content)
                pictures = {_key(member.name): member for member in members if member.name.rpartition(".")[2].lower() in PICTURES}
                links = {_key(member.name): member for member in members if member.name.endswith(".json")}
                for name, member in pictures.items():
                    link = links.get(name) if urls else None
                    told = [] if link is None else _url(content[link.first:link.first + link.size])
                    folder, _, base = member.name.rpartition("/")
                    plain = base.rpartition(".")[0]
                    for each in {member.name, base, plain, *told, *([] if folder else [f"/{base}"])}:
                        names.append(each)
                        rows.append(len(places))
                    places.append((number, member.first, member.size))
        except ValueError as error:  # an empty file
            faults = [str(error)]
        damage += [f"{path.name}: {fault}" for fault in faults]
        hashes.append(hashed([name.encode(errors="surrogatepass") for name in names]))
    joined = np.concatenate([np.zeros(0, np.uint64), *hashes])
    order = np.argsort(joined, kind="stable")  # of pictures of one name, the first
    return Shelf(tars, joined[order], np.array(rows, np.int64)[order], np.array(places, np.int64).reshape(-1, 3), tuple(damage))


def _key(name: str) -> str:
    """Name without its extension."""
    return name.rpartition(".")[0]


def _url(record: bytes) -> list[str]:
    try:
        url = json.loads(record).get("url")
    except (ValueError, AttributeError, RecursionError):
        return []
    return [url] if isinstance(url, str) else []
