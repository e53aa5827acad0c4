"""A piece of a source: as much of it as one process reads in one go, and what is done again where it was interrupted.

A piece is a file, a slice of a large one, or a slice of the sorted files of a folder. Its name says where it lies below the source, so
that it stays the same when the source is moved.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PICTURES = ("png", "jpg", "jpeg", "webp")
"""Extensions of picture files."""
SLICE_BYTES = 64 << 20
"""Of lines or of a table, in a piece."""
SLICE_FILES = 2048
"""Samples of a folder in a piece."""


class Piece(NamedTuple):
    source: Path
    path: Path
    """A file, or the source itself where a piece is some of its files."""
    part: int = 0
    parts: int = 1
    """It is part `part` of `parts`."""
    files: tuple[Path, ...] = ()
    """Of the source, where it is those."""

    @property
    def within(self) -> str:
        """Where its file lies below the source, the same for all parts; "." where it is some files of a folder."""
        return self.path.name if self.source.is_file() else self.path.relative_to(self.source).as_posix()

    @property
    def name(self) -> str:
        return self.within if self.parts == 1 else f"{self.within}#{self.part + 1}/{self.parts}"

    def state(self) -> str:
        """Names, sizes and times of its files as 16 hex digits: other ones, and what was read of them may no longer hold."""
        digest = hashlib.sha256()
        for path in self.files or (self.path,):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


class Refusal(NamedTuple):
    """A sample that is none."""

    name: str
    """In its piece."""
    error: ValueError
    """Whose message starts with the cause and a colon."""


def files(source: Path, *extensions: str) -> tuple[Path, ...]:
    """The files of a source, sorted; a source may be one. Extensions in lower case, without the dot, and may hold one: "jsonl.gz".
    Errors: FileNotFoundError where the source is not there."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name a folder or a file to convert")
    endings = tuple(f".{extension}" for extension in extensions)
    found = [source] if source.is_file() else sorted(source.rglob("*"))
    return tuple(path for path in found if path.name.lower().endswith(endings) and path.is_file())


def whole(source: Path, *extensions: str) -> list[Piece]:
    """A piece a file."""
    return [Piece(source, path) for path in files(source, *extensions)]


def slices(source: Path, samples: Sequence[Sequence[Path]]) -> list[Piece]:
    """Pieces of a folder, each of some samples, which are files."""
    parts = -(-len(samples) // SLICE_FILES)
    bounds = [len(samples) * part // max(parts, 1) for part in range(parts + 1)]
    return [Piece(source, source, part, parts, tuple(path for sample in samples[bounds[part]:bounds[part + 1]] for path in sample))
            for part in range(parts)]
