"""Verbs that choose and change what is in raw shards: `mmllm data filter`, `dedup`, `score` and `recaption`.

Each reads a folder of raw shards and writes another one, shard by shard, and goes on where it was interrupted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from tyro.conf import OmitArgPrefixes

from data.curate.texts import TextRules
from mmllm.progress import say
from mmllm.verbs.verb import Verb

if TYPE_CHECKING:
    from data.curate.workers import Tell

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Leave out pictures and texts of raw shards by size, shape, length, words and scores."""

    raw: Path
    """Folder of raw shards."""
    out: Path
    """Folder for the raw shards that are left, and curation.json."""
    prefix: str = ""
    """Shards whose names start with it."""
    processes: int = 1
    """Processes, a shard at a time each."""
    on_loss: Literal["document", "part"] = "document"
    """A refused picture or text: "document" drops the document, "part" leaves it out where others of its kind are left. A caption or a
    question is left out alone, a conversation is dropped whole."""
    min_side: int = 1
    """Shortest side of a picture, in pixels."""
    max_side: int | None = None
    """Longest side of a picture, in pixels."""
    max_pixels: int = 64_000_000
    """Most pixels of a picture."""
    max_aspect: float = 20.0
    """Longest side over the shortest."""
    formats: tuple[Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"], ...] = ("jpeg", "png", "webp")
    """What the bytes of a picture are, whatever it is called."""
    animated: Literal["first", "refuse"] = "first"
    """A picture of several frames: taken for its first one, or not."""
    decode: bool = True
    """Decode every picture, or judge it by its header alone."""
    texts: OmitArgPrefixes[TextRules] = field(default_factory=TextRules)
    scores: Path | None = None
    """Folder that `mmllm data score` wrote for these shards."""
    min_clip: float | None = None
    """Least cosine of a picture and its text."""
    top_clip: float | None = None
    """Share of the pictures that is taken, those of the highest cosine."""
    min_aesthetic: float | None = None
    """Least aesthetic score of a picture."""
    top_aesthetic: float | None = None
    """Share of the pictures that is taken, those of the highest aesthetic score."""


def data_filter(args: Filter) -> None:
    from data import shards
    from data.curate.filter import Limit, Rules, filter_shards
    from data.curate.pictures import PictureRules

    pictures = PictureRules(min_side=args.min_side, max_side=args.max_side, max_pixels=args.max_pixels, max_aspect=args.max_aspect,
                            formats=args.formats, animated=args.animated, decode=args.decode)
    rules = Rules(pictures=pictures, texts=args.texts, scores=args.scores, clip=Limit(least=args.min_clip, top=args.top_clip),
                  aesthetic=Limit(least=args.min_aesthetic, top=args.top_aesthetic), on_loss=args.on_loss)
    report = _run("filtering", lambda tell: filter_shards(shards.find(args.raw, args.prefix), args.out, rules, args.processes, tell))
    say(f"{report}\n{args.out / 'curation.json'}")


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Leave out documents of raw shards that are there already, in them or in another set."""

    raw: Path
    """Folder of raw shards."""
    out: Path
    """Folder for the raw shards that are left, groups.jsonl and curation.json."""
    prefix: str = ""
    """Shards whose names start with it."""
    processes: int = 1
    """Processes, a shard at a time each."""
    exact: bool = False
    """Pixels must be equal, file format and compression apart; else perceptual hashes decide."""
    distance: int = 4
    """Bits of 64 in which the perceptual hashes of two pictures may differ."""
    by: Literal["pictures", "both"] = "pictures"
    """Whether two documents with pictures must say the same too."""
    keep: Literal["first", "largest"] = "first"
    """Which stays: that of the smallest key, or of the most pixels."""
    against: Path | None = None
    """Folder of raw shards that shall stay unseen: documents with a picture of it are left out too."""
    max_pixels: int = 64_000_000
    """Largest picture that is decoded."""


def data_dedup(args: Dedup) -> None:
    from data import shards
    from data.curate.duplicates import Alike, dedup

    alike = Alike(exact=args.exact, distance=args.distance, by=args.by, keep=args.keep, max_pixels=args.max_pixels)
    against = shards.find(args.against) if args.against else []
    report = _run("duplicates", lambda tell: dedup(shards.find(args.raw, args.prefix), args.out, alike, against, args.processes, tell))
    say(f"{report}\n{args.out / 'groups.jsonl'}\n{args.out / 'curation.json'}")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score the pictures of raw shards with a CLIP model, for `mmllm data filter --scores`."""

    raw: Path
    """Folder of raw shards."""
    out: Path
    """Folder for a jsonl of scores a shard."""
    clip: str
    """open_clip:NAME:WEIGHTS, or open_clip:FOLDER."""
    aesthetic: Path | None = None
    """Aesthetic head on the picture's embedding: a file in LAION's layout."""
    prefix: str = ""
    """Shards whose names start with it."""
    processes: int = 1
    """Processes, each with the model, its share of the shards, the cores and the GPUs."""
    batch_len: int = 256
    """Pictures that are embedded at once."""
    max_pixels: int = 64_000_000
    """Largest picture that is decoded."""


def data_score(args: Score) -> None:
    from data import shards
    from data.curate import scores

    how = scores.Scoring(clip=args.clip, aesthetic=args.aesthetic, batch_len=args.batch_len, max_pixels=args.max_pixels)
    source = shards.find(args.raw, args.prefix)
    _run("scoring", lambda tell: scores.score(source, args.out, how, args.processes, tell))
    say("\n".join(scores.summary(args.out, source)))


@dataclass(frozen=True, kw_only=True)
class Recaption:
    """Replace or add captions of raw shards from a jsonl of keys and captions."""

    raw: Path
    """Folder of raw shards."""
    out: Path
    """Folder for the raw shards with new captions, and curation.json."""
    captions: Path
    """A file of lines {"key": …, "caption": …} or {"key": …, "captions": […]}."""
    how: Literal["replace", "add"] = "replace"
    """"replace": the new captions alone; "add": behind the old ones."""
    missing: Literal["keep", "drop"] = "keep"
    """A document without a line stays as it is, or is dropped."""
    prefix: str = ""
    """Shards whose names start with it."""
    processes: int = 1
    """Processes, a shard at a time each."""


def data_recaption(args: Recaption) -> None:
    from data import shards
    from data.curate import captions

    how = captions.Recaption(captions=args.captions, how=args.how, missing=args.missing)
    source = shards.find(args.raw, args.prefix)
    report, lines = _run("captions", lambda tell: captions.recaption(source, args.out, how, args.processes, tell))
    say(f"{report}\n{lines.keys:,} keys in {args.captions.name}, {lines.unknown:,} without a document"
        + (f"; lines left out: {lines.bad}" if lines.bad else "") + f"\n{args.out / 'curation.json'}")


def _run(title: str, work: "Callable[[Tell], T]") -> T:
    """With progress; a process that was killed is no fault of the input."""
    from data.encode import ProcessFailed
    from mmllm.launch import RankFailed
    from mmllm.progress import Progress

    try:
        with Progress(title, "shards") as progress:
            return work(progress)
    except ProcessFailed as error:
        raise RankFailed(str(error)) from error


VERBS = {
    "data filter": Verb(Filter, data_filter, ("raw", "out")),
    "data dedup": Verb(Dedup, data_dedup, ("raw", "out")),
    "data score": Verb(Score, data_score, ("raw", "out")),
    "data recaption": Verb(Recaption, data_recaption, ("raw", "out")),
}
