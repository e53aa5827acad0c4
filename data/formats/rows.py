"""Rows of a file: an object a line (jsonl), a list of objects (json), a table (parquet).

A row that cannot be read is refused alone. Lines and tables are cut into pieces of about 64 MiB, which any process can read; a row's
name is its place in the file, whatever the pieces: the byte where its line begins, or its number.
"""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.document import Document
from data.formats.piece import SLICE_BYTES, Piece, Refusal, files

ENDINGS = ("jsonl", "ndjson", "jsonl.gz", "jsonl.zip", "json", "parquet")
LINE_BYTES = 64 << 20
"""Longest line; a picture in a data: URL may well be some MB."""
Row = dict[str, Any]


def pieces(source: Path, *endings: str) -> list[Piece]:
    """Errors: ValueError for a parquet file that is none."""
    return [piece for path in files(source, *(endings or ENDINGS)) for piece in _slices(source, path)]


def _slices(source: Path, path: Path) -> list[Piece]:
    parts = -(-path.stat().st_size // SLICE_BYTES)
    if path.name.endswith(".parquet"):
        parts = min(parts, _table(path).metadata.num_row_groups)
    elif not path.name.endswith((".jsonl", ".ndjson")):
        parts = 1
    return [Piece(source, path, part, max(parts, 1)) for part in range(max(parts, 1))]


def documents(piece: Piece, make: Callable[[Row, str], Document], columns: tuple[str, ...] | None = None) -> Iterator[Document | Refusal]:
    """Make a document of each row, which is told its name. columns: those of a table that are read, where it has
    them; all without it."""
    for name, row in rows(piece, columns):
        try:
            if isinstance(row, ValueError):
                raise row
            yield replace(make(row, f"{piece.within}/{name}"), key=name)
        except ValueError as error:
            yield Refusal(name, error)


def rows(piece: Piece, columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, Row | ValueError]]:
    """(name, row) in the file's order."""
    if piece.path.name.endswith(".parquet"):
        yield from _of_table(piece, columns)
    elif piece.path.name.endswith(".json"):
        yield from _of_list(piece.path)
    else:
        yield from _of_lines(piece)


def names(path: Path) -> list[str]:
    """The columns of a table, or the fields of the first row that can be read."""
    if path.name.endswith(".parquet"):
        return list(_table(path).schema_arrow.names)
    return next((list(row) for _, row in rows(Piece(path, path)) if not isinstance(row, ValueError)), [])


def _of_lines(piece: Piece) -> Iterator[tuple[str, Row | ValueError]]:
    first, end = 0, None
    if piece.parts > 1:
        size = piece.path.stat().st_size
        first, end = size * piece.part // piece.parts, size * (piece.part + 1) // piece.parts
    at = first
    try:
        with _opened(piece.path) as file:
            if first:
                file.seek(first - 1)
                at = first - 1 + _skip(file)  # behind the line that began before
            while end is None or at < end:
                line = file.readline(LINE_BYTES)
                if not line:
                    return
                if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                    length = LINE_BYTES + _skip(file)
                    yield str(at), ValueError(f"line too long: {length:,} bytes, over {LINE_BYTES:,}")
                else:
                    length = len(line)
                    if line.strip():
                        yield str(at), _parsed(line)
                at += length
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        yield str(at), ValueError(f"damaged file: {error}")


def _opened(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path))
    if path.name.endswith(".zip"):
        archive = zipfile.ZipFile(path)
        if len(archive.namelist()) != 1:
            raise zipfile.BadZipFile(f"it holds {len(archive.namelist())} files, not one")
        return cast(BinaryIO, io.BufferedReader(cast(Any, archive.open(archive.namelist()[0]))))
    return path.open("rb")


def _skip(file: BinaryIO) -> int:
    """Read to the end of a line. → bytes"""
    length = 0
    while part := file.readline(1 << 20):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def _parsed(line: bytes) -> Row | ValueError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"no JSON: {error}")
    return _row(row)


def _row(row: object) -> Row | ValueError:
    return row if isinstance(row, dict) else ValueError(f"no object: the row is {_short(row)}")


def _short(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def _of_list(path: Path) -> Iterator[tuple[str, Row | ValueError]]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        yield "0", ValueError(f"no JSON: {error}")
        return
    for number, row in enumerate(found if isinstance(found, list) else [found]):
        yield str(number), _row(row)


# Tables -----------------------------------------------------------------------------------------------------------

def _table(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is a parquet file, which pyarrow reads: pip install 'mmllm[data]'") from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged, or no parquet file: {error}. Fetch it again, or remove it") from error


def _of_table(piece: Piece, columns: tuple[str, ...] | None) -> Iterator[tuple[str, Row | ValueError]]:
    from pyarrow import ArrowException

    table = _table(piece.path)
    number = 0
    groups = table.metadata.num_row_groups
    for group in range(groups):
        count = table.metadata.row_group(group).num_rows
        if groups * piece.part // piece.parts <= group < groups * (piece.part + 1) // piece.parts:
            try:
                batches = table.iter_batches(batch_size=64, row_groups=[group], columns=columns and list(columns))
                for at, row in enumerate(row for batch in batches for row in _of_batch(batch)):
                    yield str(number + at), row
            except (ArrowException, OSError) as error:
                yield str(number), ValueError(f"damaged file: row group {group}: {error}")
        number += count


def _of_batch(batch: Any) -> list[Row | ValueError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [ValueError("text is not UTF-8: in a column of the table")]
        return [row for at in range(len(batch)) for row in _of_batch(batch.slice(at, 1))]
