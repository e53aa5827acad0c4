"""Files wherever they lie: on a disk, or in a store behind an fsspec URL (s3://, gs://, https://, memory://, …).

A file on a disk is mapped, and a range of it is a view without a copy. A file in a store is read by byte ranges, at the same time
those that are asked for together, and again where one fails for a reason that may pass. Nothing stays open for a `Reader`: it is a
name and a size, goes to a worker process as it is, and a million of them hold no file descriptor.

A store that fails is an OSError, never a ValueError: an outage must not count as a bad document.
"""

import io
import mmap
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")
Place = str | Path
"""A path or a URL; also a `Path` made of a URL, which has lost a slash."""

ATTEMPTS = 5
FIRST_WAIT_S = 0.5
"""Before the second attempt; doubles with each, and varies by half so that a thousand ranks do not come back at once."""
TIMEOUT_S = 60.0
"""Of one request, or of those that are made together."""
AT_ONCE = 64
"""Requests."""
CHUNK = 8 * 2**20
"""bytes of a request where a whole file is read."""
MAPS_HELD = 512
"""Files mapped at a time, well below the usual 1,024 file descriptors."""

SCHEME = re.compile(r"(^|::)([a-z][a-z0-9+.\-]+):/+")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs",
            "abfs": "adlfs", "hf": "huggingface_hub"}
_jitter = random.SystemRandom()  # not the one that a run seeds, nor one that forked workers have in common


# Names ------------------------------------------------------------------------------------------------------------

def url(place: Place) -> str | None:
    """The URL of a place in a store; None for a path on a disk."""
    text = str(place)
    return SCHEME.sub(r"\1\2://", text) if SCHEME.match(text) and not text.startswith("file:") else None


def local(place: Place) -> Path:
    """The path of a place on a disk, `file:///…` among them."""
    return Path(re.sub("^file:/+", "/", str(place)))


def join(folder: Place, name: str) -> Place:
    remote = url(folder)
    return local(folder) / name if remote is None else f"{remote.rstrip('/')}/{name}"


def names(folder: Place) -> list[str]:
    """What lies directly in a folder, sorted. Errors: FileNotFoundError for none; OSError for a store that fails."""
    remote = url(folder)
    if remote is None:
        return sorted(path.name for path in local(folder).iterdir())
    files, path = _filesystem(remote)

    def listed() -> list[str]:
        files.invalidate_cache(path)
        return files.ls(path, detail=False, **_within(files))

    inside = f"{path.rstrip('/')}/"
    found = {name.removeprefix(inside).rstrip("/") for name in _patiently(listed, remote) if name.startswith(inside)}
    return sorted(name for name in found if name and "/" not in name and "?" not in name)


# Reading ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Reader:
    """A file that is read by ranges."""

    place: str
    """Path or URL."""
    size: int
    """bytes"""
    stamp: tuple[int, int, int] | None
    """What tells a file on a disk from one that took its place: inode, time of change in ns, bytes. None in a store."""

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Errors: OSError for a range that is not in the file, a file on a disk that changed, or a store that fails."""
        if self.stamp is None or offset < 0 or size < 0 or offset + size > self.size:
            return gather([(self, offset, size)])[0]
        return _mapped(self.place, self.stamp)[offset:offset + size]

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> list[bytes | memoryview]:
        """Content of each (offset, size), in their order."""
        return gather([(self, offset, size) for offset, size in ranges])

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The whole file in order, of a store a few requests ahead."""
        step = CHUNK * 8
        for first in range(0, self.size, step):
            yield from self.read_many((at, min(CHUNK, self.size - at)) for at in range(first, min(first + step, self.size), CHUNK))


def open(place: Place) -> Reader:
    """Errors: FileNotFoundError for no file; OSError for a store that fails; ValueError for a filesystem that is not installed."""
    remote = url(place)
    if remote is None:
        path = local(place)
        stat = path.stat()
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file")
        return Reader(str(path), stat.st_size, (stat.st_ino, stat.st_mtime_ns, stat.st_size))
    files, path = _filesystem(remote)
    found = _patiently(lambda: files.info(path, **_within(files)), remote)
    if found["type"] != "file":
        raise FileNotFoundError(f"{remote} is no file")
    if found["size"] is None:
        raise OSError(f"{remote}: the server does not tell the size of the file, so it cannot be read by ranges: copy it to a disk")
    return Reader(remote, found["size"], None)


def read_bytes(place: Place) -> bytes:
    """A whole file."""
    return local(place).read_bytes() if url(place) is None else b"".join(open(place).chunks())


def copy(place: Place, file: BinaryIO) -> None:
    """A whole file into another; of a store, 64 MiB are in memory at a time."""
    for chunk in open(place).chunks():
        file.write(chunk)


def gather(ranges: Sequence[tuple[Reader, int, int]]) -> list[bytes | memoryview]:
    """Content of each (reader, offset, size), of any files, in their order; at the same time what lies in one store."""
    found: list[bytes | memoryview] = [b""] * len(ranges)
    away: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for number, (reader, offset, size) in enumerate(ranges):
        if offset < 0 or size < 0 or offset + size > reader.size:
            raise OSError(f"{reader.place} has {reader.size:,} bytes, and bytes {offset:,} to {offset + size:,} were asked for: "
                          "the index is not that of the file")
        if reader.stamp is not None:
            found[number] = reader.read(offset, size)
        elif size:
            files, path = _filesystem(reader.place)
            away.setdefault(id(files), (files, []))[1].append((number, path))
    for files, wanted in away.values():
        missing = dict(wanted)

        def take(files: Any = files, missing: dict[int, str] = missing) -> None:
            numbers = list(missing)
            starts = [ranges[number][1] for number in numbers]
            ends = [ranges[number][1] + ranges[number][2] for number in numbers]
            how = {"batch_size": AT_ONCE, **_within(files)} if files.async_impl else {}
            failed: list[Exception] = []
            answers = files.cat_ranges([missing[number] for number in numbers], starts, ends, on_error="return", **how)
            for number, content in zip(numbers, answers, strict=True):
                try:
                    found[number] = _checked(content, *ranges[number])
                    del missing[number]
                except Exception as error:
                    failed.append(error)
            if failed:
                raise next(filter(_final, failed), failed[0])

        _patiently(take, ranges[wanted[0][0]][0].place)
    return found


def _checked(content: Any, reader: Reader, offset: int, size: int) -> bytes:
    if isinstance(content, Exception):
        raise content
    if len(content) == reader.size > size:
        raise io.UnsupportedOperation(f"the server sends the whole file where {size:,} bytes were asked for: copy it to a disk")
    if len(content) != size:
        raise ConnectionError(f"{len(content):,} bytes came where {size:,} were asked for at byte {offset:,}")
    return content


@lru_cache(MAPS_HELD)
def _mapped(path: str, stamp: tuple[int, int, int]) -> memoryview:
    with Path(path).open("rb") as file:
        stat = os.fstat(file.fileno())
        if (stat.st_ino, stat.st_mtime_ns, stat.st_size) != stamp:
            raise OSError(f"{path} changed since it was opened: it was written again while it was read")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if stat.st_size else b"")


# Stores -----------------------------------------------------------------------------------------------------------

def _filesystem(remote: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it). fsspec keeps the instances, a process and a thread its own."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(remote)
    except (ImportError, ValueError) as error:
        scheme = remote.partition(":")[0]
        needed = f"pip install {PACKAGES[scheme]}" if scheme in PACKAGES else "give a path, or a URL that fsspec knows"
        raise ValueError(f"{remote}: there is no filesystem for {scheme}:// ({error}): {needed}") from error


def _within(files: Any) -> dict[str, Any]:
    return {"timeout": TIMEOUT_S} if files.async_impl else {}


def _patiently(call: Callable[[], T], remote: str) -> T:
    """What `call` returns, called again while it fails for a reason that may pass."""
    wait = FIRST_WAIT_S
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            if _final(error):
                kind = next((kind for kind in (FileNotFoundError, PermissionError) if isinstance(error, kind)), OSError)
                raise kind(f"{remote} cannot be read: {said}") from error
            if attempt + 1 == ATTEMPTS:
                raise ConnectionError(f"{remote} could not be read in {ATTEMPTS} attempts, the last: {said}. "
                                      "Is the store up, and reached from here?") from error
        time.sleep(wait * (0.5 + _jitter.random()))
        wait *= 2
    raise AssertionError


def _final(error: BaseException) -> bool:
    """Whether it would fail again. What a store raises has no common type, so what is not known to be final may pass."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and (isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")):
        return cause is None or _final(cause)  # fsspec's HTTP says so of anything that fails
    if isinstance(status := getattr(error, "status", None), int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | io.UnsupportedOperation
                      | NotImplementedError | TypeError | KeyError | ImportError)
