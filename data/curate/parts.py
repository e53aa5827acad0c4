"""What a document is when some of its parts are refused.

    on_loss "document"   a refused picture or text drops the document
    on_loss "part"       it is left out, and the document is dropped where no picture, or no text, is left of those it had

Captions are other words for the same, and questions stand beside a picture: a refused one is left out alone under both. A conversation
is dropped whole: its turns answer each other.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from data.curate.rewrite import Sample
from data.document import Document
from data.skipped import Skipped

OnLoss = Literal["document", "part"]


class Place(NamedTuple):
    """Where in a document something is."""

    field: Literal["parts", "captions", "questions"]
    number: int


def texts(document: Document) -> list[tuple[Place, str]]:
    """Everything said, a question with its answer."""
    return [*((Place("parts", i), part) for i, part in enumerate(document.parts) if isinstance(part, str)),
            *((Place("captions", i), caption) for i, caption in enumerate(document.captions)),
            *((Place("questions", i), f"{question}\n{answer}") for i, (question, answer) in enumerate(document.questions))]


def pictures(document: Document) -> list[tuple[Place, bytes]]:
    """Picture files in reading order."""
    return [(Place("parts", i), part) for i, part in enumerate(document.parts) if isinstance(part, bytes)]


def without(sample: Sample, document: Document, refused: Mapping[Place, ValueError], on_loss: OnLoss, noted: Skipped) -> Sample:
    """The sample of `document` without what is refused. Errors: the first refusal, where it drops the document."""
    if not refused:
        return sample
    first = next(iter(refused.values()))
    lost = {place.number: error for place, error in refused.items() if place.field == "parts"}
    if document.roles or (lost and on_loss == "document"):
        raise next(iter(lost.values()), first)
    kept = [part for i, part in enumerate(document.parts) if i not in lost]
    captions = [i for i in range(len(document.captions)) if Place("captions", i) not in refused]
    had_text = bool(document.captions) or any(isinstance(part, str) for part in document.parts)
    if not kept or (had_text and not captions and not any(isinstance(part, str) for part in kept)):
        raise first
    if pictures(document) and not any(isinstance(part, bytes) for part in kept):
        raise next(error for i, error in lost.items() if isinstance(document.parts[i], bytes))
    for error in refused.values():
        noted.refuse(ValueError(f"left out, {error}"), document.key)
    record: dict[str, Any] = json.loads(sample["json"])
    before = {name for name in record["images"] if name}
    for field in ("texts", "images"):
        record[field] = [value for i, value in enumerate(record[field]) if i not in lost]
    for field in ("captions", "questions"):
        if field in record:
            record[field] = [value for i, value in enumerate(record[field]) if Place(field, i) not in refused]
    unnamed = before - set(record["images"])
    return {name: value for name, value in sample.items() if name not in unnamed} | {"json": to_json(record)}


def to_json(record: Mapping[str, object]) -> bytes:
    """`KEY.json` as data.shards writes it."""
    return json.dumps(record, ensure_ascii=False).encode()
