"""Scores of pictures, kept beside the shards, so that another threshold needs no model.

    train-000000.jsonl   a line a document: {"key": …, "clip": [0.31, …], "aesthetic": [5.2, …]}, a number a picture in reading order
    settings.json        the model

*clip* is the cosine of picture and text (Hessel et al. 2021, arXiv:2104.08718, without its factor). The only picture of a document has
every text part and caption for its text; one of several has the nearest text part before it and the nearest behind it. The best of them
counts, so a picture that one text describes is not blamed for the others. *aesthetic* is a head on the picture's embedding. A score is
null for a picture without text, without head, or that is refused, and then "refused" says why.

Letters: p pictures, t texts, d width of the space that both share.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data import shards
from data.curate.clip import Aesthetic, Clip
from data.curate.rewrite import claim, content_of
from data.curate.workers import Tell, on_each, silent
from data.document import Document
from data.files import written
from data.images import MAX_PIXELS, Limits, Refused, fitted, to_array
from tokenizer.tower_source import parse, weights_in

Name = Literal["clip", "aesthetic"]
NAMES: tuple[Name, ...] = ("clip", "aesthetic")
SHARES = (1, 10, 30, 50, 70, 90, 99)
"""Percent of the pictures that a summary names the scores of."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What scores are made by."""

    clip: str
    """`open_clip:NAME:WEIGHTS`, see `tokenizer.tower_source`."""
    aesthetic: Path | None = None
    """A head on the picture's embedding, see `data.curate.clip.Aesthetic`; None: no such score."""
    batch_len: int = 256
    """Pictures that are embedded at once."""
    max_pixels: int = MAX_PIXELS
    """Largest picture that is decoded."""

    def settings(self) -> dict[str, object]:
        """With what the files hold in place of where they are."""
        source = parse(self.clip)
        weights = source.weights and (source.weights if source.weights.is_file() else weights_in(source.weights))
        return {"command": "score", "clip": str(source), "weights": content_of(weights), "aesthetic": content_of(self.aesthetic),
                "max_pixels": self.max_pixels}


class Scored(NamedTuple):
    """One line of a score file."""

    key: str
    clip: Sequence[float | None] = ()
    aesthetic: Sequence[float | None] = ()
    refused: Sequence[str | None] = ()
    """Why a picture has no scores; empty where all have."""


def score(source: Sequence[Path], folder: Path, how: Scoring, processes: int = 1, progress: Tell = silent) -> None:
    """Write the scores of raw shards into `folder`, which may hold some already. Errors: ValueError, FileNotFoundError; ProcessFailed."""
    claim(folder, source, how.settings())
    missing = [path for path in source if not scores_path(folder, path).exists()]
    if missing and processes == 1:
        _loaded(how)  # or say now what is wrong with it
    on_each(partial(_score_one, folder=folder, how=how), missing, processes, progress, len(source) - len(missing))


def scores_path(folder: Path, shard: Path) -> Path:
    return folder / f"{shard.stem}.jsonl"


def read(path: Path) -> Iterator[Scored]:
    """Errors: FileNotFoundError, ValueError for a line that is no scores."""
    if not path.is_file():
        raise FileNotFoundError(f"there are no scores {path}: `mmllm data score` writes them")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Scored(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no scores of a document: {error}") from error


def threshold_of_top(paths: Sequence[Path], name: Name, share: float) -> float:
    """The score that the best `share` of all pictures with one reach. Errors: ValueError for a share that is none, or no score."""
    if not 0 < share <= 1:
        raise ValueError(f"top_{name} is {share}: a share lies in (0, 1]")
    found = np.sort(np.concatenate([_numbers(path, name) for path in paths]))
    if not len(found):
        raise ValueError(f"no picture has a score of {name}: score the shards with --{name}")
    return float(found[-max(1, round(share * len(found)))])


def summary(folder: Path, source: Sequence[Path]) -> list[str]:
    """Lines that say how scores are spread, and where thresholds would cut."""
    out: list[str] = []
    numbers, refused = {name: array("d") for name in NAMES}, Counter[str]()
    for scored in (scored for path in source for scored in read(scores_path(folder, path))):
        for name in NAMES:
            numbers[name].extend(value for value in getattr(scored, name) if value is not None)
        refused.update(why.partition(": ")[0] for why in scored.refused if why)
    for name in NAMES:
        values = np.array(numbers[name])
        if len(values):
            spread = "  ".join(f"{share}%: {value:.3f}" for share, value in
                               zip(SHARES, np.percentile(values, SHARES).tolist(), strict=True))
            out.append(f"{name}: {len(values):,} pictures, mean {values.mean():.3f}; below {spread}")
    return [*out, *(f"no scores: {count:,} × {cause}" for cause, count in refused.items())]


def _numbers(path: Path, name: Name) -> NDArray[np.float64]:
    return np.array([value for scored in read(path) for value in getattr(scored, name) if value is not None], np.float64)


# Making them ------------------------------------------------------------------------------------------------------

@lru_cache(1)
def _loaded(how: Scoring) -> tuple[Clip, Aesthetic | None]:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    clip = Clip.load(how.clip, device)
    head = Aesthetic.load(how.aesthetic, device) if how.aesthetic else None
    if head and head.width != clip.width:
        raise ValueError(f"{how.aesthetic} reads embeddings of {head.width} dims, and {how.clip} gives {clip.width}: "
                         "name the model that it was trained on")
    return clip, head


def _score_one(path: Path, folder: Path, how: Scoring) -> int:
    clip, head = _loaded(how)
    lines: list[str] = []
    batch: list[tuple[str, Document | None]] = []
    waiting = 0

    def flush() -> None:
        nonlocal waiting
        lines.extend(_line(scored) for scored in scored_batch(batch, clip, head, how))
        batch.clear()
        waiting = 0

    for sample in shards.samples(path):
        try:
            document = shards.document_of(sample)
        except ValueError:  # a filter refuses it
            document = None
        batch.append((str(sample["__key__"]), document))
        waiting += 0 if document is None else sum(isinstance(part, bytes) for part in document.parts)
        if waiting >= how.batch_len:
            flush()
    flush()
    with written(scores_path(folder, path), by_many=True) as beside:
        beside.write_text("".join(lines))
    return len(lines)


def _line(scored: Scored) -> str:
    return json.dumps({name: value for name, value in scored._asdict().items() if value}, ensure_ascii=False) + "\n"


def scored_batch(documents: Sequence[tuple[str, Document | None]], clip: Clip, head: Aesthetic | None, how: Scoring) -> list[Scored]:
    """Scores of some documents, all their pictures embedded together, and all their texts."""
    limits = Limits(max_pixels=how.max_pixels)
    pixels: list[NDArray[np.uint8]] = []
    rows: list[list[tuple[int | None, str | None, list[str]]]] = []  # of each picture: row of its embedding, or refusal; its texts
    for _, document in documents:
        rows.append([])
        for file, texts in [] if document is None else described(document):
            try:
                pixels.append(to_array(fitted(file, clip.image_size, limits)))
                rows[-1].append((len(pixels) - 1, None, texts))
            except Refused as error:
                rows[-1].append((None, str(error), texts))
    known = {text: i for i, text in enumerate(sorted({text for row in rows for _, _, texts in row for text in texts}))}
    pictures, words = clip.embed_pictures(pixels, how.batch_len), clip.embed_texts(list(known), how.batch_len)  # [p, d], [t, d]
    beauty = head(pictures).tolist() if head and len(pictures) else []
    out: list[Scored] = []
    for (key, _), row in zip(documents, rows, strict=True):
        cosines = [None if i is None or not texts else (words[[known[text] for text in texts]] @ pictures[i]).max().item()
                   for i, _, texts in row]
        refusals = [refusal for _, refusal, _ in row]
        out.append(Scored(key, cosines, [None if i is None else beauty[i] for i, _, _ in row] if head else (),
                          refusals if any(refusals) else ()))
    return out


def described(document: Document) -> list[tuple[bytes, list[str]]]:
    """Each picture with the texts that may describe it."""
    texts = {i: part for i, part in enumerate(document.parts) if isinstance(part, str) and part.strip()}
    places = [i for i, part in enumerate(document.parts) if isinstance(part, bytes)]
    if len(places) == 1:
        said = [*texts.values(), *(caption for caption in document.captions if caption.strip())]
        return [(part, said) for part in document.parts if isinstance(part, bytes)]
    out: list[tuple[bytes, list[str]]] = []
    for i, part in enumerate(document.parts):
        if isinstance(part, bytes):
            near = max((k for k in texts if k < i), default=None), min((k for k in texts if k > i), default=None)
            out.append((part, [texts[k] for k in near if k is not None]))
    return out
