"""What a task of an evaluation is: pieces of work that any process may do, and numbers made of what they leave.

    units → run → records → score → measures

A *unit* has a name and does not depend on others, a *record* is what became of it, plain values, kept in OUT/records/TASK.jsonl. So work
goes on after an interruption where it was, and is shared out without a word between processes; numbers are made of all records anew.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from data.images import load_image, to_array, to_png
from mmllm.evaluate.bootstrap import Measure
from mmllm.evaluate.items import Item, items
from mmllm.evaluate.settings import Evaluation
from mmllm.generate.engine import Engine
from mmllm.hf import Folder, open_folder

SIDE = 256
"""px: longest side of a picture on the page."""

Record = dict[str, Any]
"""Has `name` and `split` of its unit."""


DRAWN_BY = ("seed", "temperature", "guidance")
"""What a picture depends on."""


class Unit(NamedTuple):
    name: str
    split: str
    work: Any


class Example(NamedTuple):
    """A record as the page shows it."""

    pictures: list[str]
    """PNG files in base64."""
    lines: list[tuple[str, bool | None]]
    """What was asked, wanted and said, and whether it was right where that is known."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an evaluation is made on, opened when it is first asked for."""

    model: Path
    shards: Path | None
    out: Path
    settings: Evaluation

    @cached_property
    def engine(self) -> Engine:
        return Engine.load(self.model, self.settings.device)

    @cached_property
    def folder(self) -> Folder:
        return open_folder(self.model)

    @cached_property
    def items(self) -> list[Item]:
        return [] if self.shards is None else items(self.shards, self.settings.prefix, self.settings.limit)

    def picture(self, name: str) -> str:
        """The picture of a document, in base64, as small as a page wants it."""
        item = next(item for item in self.items if item.name == name)
        picture = load_image(item.picture)
        picture.thumbnail((SIDE, SIDE))
        return base64.b64encode(to_png(to_array(picture))).decode()

    def file(self, task: str, name: str) -> Path:
        """Where a unit keeps what is no plain value."""
        return self.out / task / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.png"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Numbers by name, `SPLIT/WHAT`."""

    measures: Mapping[str, Measure] = field(default_factory=dict[str, Measure])
    ready: Mapping[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Those that come with an interval of their own."""
    notes: Sequence[str] = ()
    """What a reader must know to read them."""
    missing: Mapping[str, str] = field(default_factory=dict[str, str])
    """What was not measured, and why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to find out about a model."""

    units: Callable[[Given], list[Unit]]
    run: Callable[[Given, list[Unit]], list[Record]]
    """Records of some units, in order; a function of each unit alone, not of what else is among them."""
    score: Callable[[Given, list[Record]], Scores]
    lacking: str
    """Why there is nothing to do where there are no units."""
    decided_by: tuple[str, ...] = ()
    """Settings that records depend on, besides model and shards."""
    at_once: int | None = None
    """Units of a piece; None is `batch`."""
    show: Callable[[Given, Record], Example] | None = None
    """A record for people."""


def by_split(records: list[Record]) -> dict[str, list[Record]]:
    return {split: [one for one in records if one["split"] == split] for split in dict.fromkeys(one["split"] for one in records)}
