"""What a format's reader is told, and the fields of a row that it asks for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.formats.keep import Keep


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source is read."""

    images: Path | None = None
    """Folder of the pictures that rows name, or of the image shards (tars) that hold them; None is the source itself."""
    columns: dict[str, str] = field(default_factory=dict[str, str])
    """Names of fields or columns, by what they are to the format: `image`, `text`, `source`, `instruction`, `target`."""
    classes: Path | None = None
    """Names of classes: a line each in order, or JSON, a list or {"0": "tench", …}; None looks for classes.txt or classes.json."""
    missing: Literal["refuse", "drop"] = "refuse"
    """An interleaved document of which a picture is missing or refused: left out, or goes on without it."""
    keep: Keep = field(default_factory=Keep)
    """What of a picture is kept."""


def column(reading: Reading, names: list[str], meaning: str, usual: tuple[str, ...]) -> str | None:
    """The field that means `meaning`: the one that was named, or the first of the usual ones that is there."""
    if meaning in reading.columns:
        return reading.columns[meaning] if reading.columns[meaning] in names else None
    return next((name for name in usual if name in names), None)


def chosen(reading: Reading, names: list[str], wanted: dict[str, tuple[str, ...]], where: str) -> dict[str, str]:
    """{meaning: field}. Errors: ValueError that says which fields there are."""
    if not names:  # no row can be read, and each says so
        return {meaning: reading.columns.get(meaning, usual[0]) for meaning, usual in wanted.items()}
    found = {meaning: column(reading, names, meaning, usual) for meaning, usual in wanted.items()}
    lacking = [meaning for meaning, name in found.items() if name is None]
    if lacking:
        looked = "; ".join(f"{m}: {reading.columns.get(m) or ', '.join(wanted[m])}" for m in lacking)
        raise ValueError(f"missing column: {where} has {', '.join(names)}, and no {' and no '.join(lacking)} (looked for {looked}): "
                         f"say which it is with columns {lacking[0]} NAME")
    return {meaning: name for meaning, name in found.items() if name is not None}


def said(value: object, what: str) -> str:
    """A text of a row, without blanks around it. Errors: ValueError for none."""
    if not isinstance(value, str):
        raise ValueError(f"no text: {what} is {type(value).__name__ if value is not None else 'missing'}")
    if not value.strip():
        raise ValueError(f"empty text: {what}")
    return value.strip()


def decoded(content: object, what: str) -> str:
    """A text file. Errors: ValueError for none."""
    assert isinstance(content, bytes), what
    try:
        return said(content.decode("utf-8-sig"), what)
    except UnicodeDecodeError as error:
        raise ValueError(f"text is not UTF-8: {what}: {error}") from error


def listed(row: dict[str, Any], name: str) -> list[Any]:
    """Errors: ValueError for a field that is no list."""
    value = row.get(name)
    if not isinstance(value, list):
        raise ValueError(f"no {name}: " + (f"it is {type(value).__name__}, not a list" if name in row else f"the row has {', '.join(row)}"))
    return value
