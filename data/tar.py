"""Members of a plain tar: where they lie, and writing them; `tarfile`'s bytes at a third of its time.

A shard is thousands of small files, and Python's tarfile takes longer over their headers than PIL over the pictures: 17 µs a
member against 5. So headers are read here: ustar and pax (POSIX.1-2008, pax(1), "pax Interchange Format" and "ustar Interchange
Format") and GNU tar's long names. What would read other than it lies there, a sparse file, is refused: so is what tarfile follows
for ever (a negative size, CVE-2025-8194).
"""

import mmap
import os
import re
import tarfile
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from data import store

BLOCK = 512
RECORD = 10_240
"""bytes; a tar ends with at least two empty blocks and fills its last record."""


Content = bytes | mmap.mmap
"""of a tar"""


class Member(NamedTuple):
    name: str
    first: int
    """byte in the tar where its content begins"""
    size: int
    """bytes"""


META = re.compile(r"__[^/]*__($|/)")
"""Members that are about a shard, not in it."""


def key_of(name: str, *, last_dot: bool = False) -> tuple[str, str] | None:
    """The sample that a member belongs to and what it is of it, by webdataset's rule: what stands up to the first dot behind the last
    slash, and the rest. None where it belongs to no sample. last_dot: up to the last dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, rest = base.rpartition(".") if last_dot else base.partition(".")
    return (folder + slash + stem, rest) if stem and dot and not META.match(name) else None


@contextmanager
def opened(place: store.Place) -> Generator[Content]:
    """The bytes of a tar, read as they are sliced; one in a store is first copied to a temporary file, since all of it will be read and
    a shard may not fit into memory. Errors: OSError for a store that fails."""
    with store.local(place).open("rb") if store.url(place) is None else tempfile.TemporaryFile() as file:
        if store.url(place) is not None:
            store.copy(place, file)
            file.flush()
        if not os.fstat(file.fileno()).st_size:
            yield b""  # what cannot be mapped
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            yield tar


def members(tar: Content) -> list[Member]:
    """Files of a tar in order; links, folders and devices are left out. Errors: ValueError for a damaged or truncated one."""
    found: list[Member] = []
    _walk(tar, 0, found)
    return found


def salvaged(tar: Content) -> tuple[list[Member], list[str]]:
    """The files that can still be read, and what is wrong where; behind a damaged header it goes on at the next sound one."""
    found: list[Member] = []
    damage: list[str] = []
    at = 0
    while True:
        try:
            _walk(tar, at, found)
            return found, damage
        except Damaged as error:
            damage.append(str(error))
            named = tar[error.at + 156:error.at + 157] in LONG_NAME
            at = _next_header(tar, error.at + BLOCK)
            if named:  # what it named would be found under another name
                at += BLOCK
            if at >= len(tar):
                return found, damage


class Damaged(ValueError):
    """What is wrong with the tar at byte `at`, where a header should be."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__(what)
        self.at = at


REGULAR, LONG_NAME, WITHOUT_CONTENT = (b"0", b"\0", b"7"), (b"x", b"X", b"L"), (b"1", b"2", b"3", b"4", b"5", b"6")
"""By the type in a header: files; headers that name the next one; links, devices, folders, pipes."""
LONGEST_HEADER = 1 << 20
"""bytes of names and other attributes of a file"""


def _walk(tar: Content, at: int, found: list[Member]) -> None:
    """Append the files from the header at byte `at` on. Errors: Damaged."""
    whole, attributes = len(tar), dict[bytes, bytes]()
    while at + BLOCK <= whole:
        header = tar[at:at + BLOCK]
        if header[0] == 0 and not any(header):
            if end := _content_behind(tar, at):
                raise Damaged(f"something follows the end of the tar at byte {at:,}: there is more at byte {end:,}", end - BLOCK)
            return
        size = _number(header[124:136])
        if not _sound(header) or size < 0:
            raise Damaged(f"the header at byte {at:,} is damaged", at)
        kind, first = header[156:157], at + BLOCK
        size = int(attributes.get(b"size", size))
        end = first + (0 if kind in WITHOUT_CONTENT else -(-size // BLOCK) * BLOCK)
        name = _text(header[:100])
        if header[257:263] == b"ustar\0" and header[345]:
            name = f"{_text(header[345:500])}/{name}"
        name = attributes.get(b"path", b"").decode(errors="surrogateescape") or name
        if min(end, first + size) > whole:
            raise Damaged(f"member {name} is cut off", at)
        if kind in LONG_NAME or kind in (b"K", b"g"):
            if size > LONGEST_HEADER:
                raise Damaged(f"the header at byte {at:,} goes on for {size:,} bytes", at)
            content = tar[first:first + size]
            attributes |= {b"path": content.partition(b"\0")[0]} if kind == b"L" else {} if kind == b"K" else _records(content, at, kind)
        else:
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in attributes):
                raise Damaged(f"member {name} is sparse: a few bytes can stand for any number", at)
            if kind in REGULAR and not (kind == b"\0" and name.endswith("/")):
                found.append(Member(name, first, size))
            attributes = {}
        at = end
    raise Damaged(f"it ends without the empty blocks of a tar, behind member {found[-1].name}" if found else "there is no header", at)


def _sound(header: bytes) -> bool:
    """Whether the sum is right that a header holds of its own bytes."""
    return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32  # the field itself counts as blanks


def _next_header(tar: Content, at: int) -> int:
    """Byte of the first sound header from `at` on; the end where there is none."""
    while (magic := tar.find(b"ustar", at + 257)) >= 0:
        at = magic - 257
        if at % BLOCK == 0 and _sound(tar[at:at + BLOCK]):
            return at
        at += 1
    return len(tar)


def _content_behind(tar: Content, at: int) -> int:
    """Byte behind `at` of the first block that is not empty; 0 where all are."""
    step = 2048 * BLOCK
    for first in range(at, len(tar), step):
        piece = tar[first:first + step]
        if piece.count(0) < len(piece):
            return first + (len(piece) - len(piece.lstrip(b"\0"))) // BLOCK * BLOCK
    return 0


def _records(content: bytes, at: int, kind: bytes) -> dict[bytes, bytes]:
    """Attributes in a pax header ("27 path=…\\n") that say where and what a member is."""
    fields: dict[bytes, bytes] = {}
    first = 0
    while first < len(content) and content[first]:
        digits = content[first:first + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[first + len(digits) + 1:first + length - 1].partition(b"=")
        if not equals or first + length > len(content):
            raise Damaged(f"the header at byte {at:,} holds records that are none", at)
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            fields[key] = value
        first += length
    if (kind == b"g" and fields) or not fields.get(b"size", b"0").isdigit() or len(fields.get(b"size", b"")) > 18:
        raise Damaged(f"the header at byte {at:,} says {', '.join(map(repr, fields.items()))}", at)
    return fields


def _number(field: bytes) -> int:
    """Octal digits, or base 256 for what is too large for them (GNU tar); -1 for neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ") or b"0"
    return int(digits, 8) if digits.isdigit() and b"8" not in digits and b"9" not in digits else -1


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def write(file: BinaryIO, files: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) as a whole tar, bytes as webdataset's TarWriter gives with mtime 0 and no owner."""
    length = 0
    for name, content in files:
        block = b"".join((_header(name, len(content)), content, bytes(-len(content) % BLOCK)))
        file.write(block)
        length += len(block)
    file.write(bytes(2 * BLOCK + -(length + 2 * BLOCK) % RECORD))


def _info(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.PAX_FORMAT)


_PLAIN = _info("", 0)


def _header(name: str, size: int) -> bytes:
    raw = name.encode(errors="surrogateescape")
    if len(raw) > 100 or not name.isascii() or size >= 8**11:
        return _info(name, size)
    header = bytearray(_PLAIN)
    header[:len(raw)] = raw
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
