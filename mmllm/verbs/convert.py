"""The verb that brings what people have into raw shards: `mmllm data convert`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmllm.progress import Progress, say
from mmllm.verbs.verb import Verb

Format = Literal["auto", "pairs", "table", "interleaved", "obelics", "mmc4", "llava", "messages", "text", "labels", "folders", "edits"]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Pictures and texts in any common format → raw shards; continues where it was interrupted."""

    source: Path
    """Folder of tars, tables, jsonl or pictures, or one such file."""
    out: Path
    """Folder for train-*.tar, seen-*.tar and convert.json."""
    format: Format = "auto"
    """What the source is; auto looks at what is there and says it. pairs: pictures with captions, in tars or a folder (img2dataset).
    table: rows of a picture and a caption. interleaved: our own shards, or Energon's. obelics, mmc4, llava, messages (OpenAI's), text:
    rows of those. labels: tars of pictures with cls. folders: pictures in a folder a class. edits: rows of a picture, what is done to
    it, and the picture after."""
    images: Path | None = None
    """Folder of the pictures that rows name, or of the image shards (tars) that hold them; the source itself without it."""
    columns: dict[str, str] = field(default_factory=dict[str, str])
    """Names of fields or columns that are not the usual ones: image NAME, text NAME, or source, instruction, target NAME."""
    classes: Path | None = None
    """Names of classes: a line each in order, or JSON."""
    missing: Literal["refuse", "drop"] = "refuse"
    """An interleaved document of which a picture is missing or refused: left out, or goes on without it."""
    size: int | None = None
    """Fit every picture to a square of this side, in pixels, as PNG; files stay as they are without it."""
    max_side: int | None = None
    """Make pictures smaller whose longest side is over this, in pixels."""
    check: Literal["full", "header"] = "full"
    """Decode every picture in full before its file is kept, or believe its header."""
    held: float = 0.05
    """Share of the documents that is held out."""
    max_bad: float = 0.05
    """Largest share of samples that may be left out."""
    max_pixels: int = 64_000_000
    """Largest picture that is taken."""
    min_side: int = 1
    """Shortest side of a picture that is taken, in pixels."""
    max_aspect: float = 20.0
    """Longest side over the shortest of a picture that is taken."""
    animated: Literal["first", "refuse"] = "first"
    """A picture of several frames: its first one, or none."""
    shard_len: int = 4096
    """Most documents of a shard."""
    shard_bytes: int = 256 << 20
    """Most bytes of a shard; each process holds as many in memory."""
    processes: int = 1
    """Processes, each with pieces of the source: a file, a slice of a large one, or some files of a folder."""


def data_convert(args: Convert) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from data.convert import convert
    from data.convert_piece import Conversion
    from data.formats.keep import Keep
    from data.formats.reading import Reading
    from data.formats.which import recognised
    from data.images import Limits
    from mmllm.launch import RankFailed

    limits = Limits(max_pixels=args.max_pixels, min_side=args.min_side, max_aspect=args.max_aspect, animated=args.animated)
    reading = Reading(images=args.images, columns=args.columns, classes=args.classes, missing=args.missing,
                      keep=Keep(size=args.size, max_side=args.max_side, check=args.check, limits=limits))
    name = args.format
    if name == "auto":
        name, why = recognised(args.source, reading)
        say(f"format {name}: {why}")
    how = Conversion(format=name, reading=reading, held=args.held, shard_len=args.shard_len, shard_bytes=args.shard_bytes)
    try:
        with Progress("converting", "pieces") as progress:
            summary = convert(args.source, args.out, how, progress, processes=args.processes, max_bad=args.max_bad)
    except BrokenProcessPool as error:
        raise RankFailed("a converting process ended without a word (killed? out of memory?): the same command goes on behind the pieces "
                         "that are whole") from error
    say(f"{summary.documents['train']:,} documents to train on, {summary.documents['seen']:,} held out, {summary.pictures:,} pictures; "
        f"{summary.shards:,} shards of {summary.pieces:,} pieces in {args.out}")
    for words, counted in (("left out", summary.skipped), ("pictures that documents went on without", summary.dropped)):
        for cause, count in counted.causes.most_common():
            say(f"{words}: {count:,} × {cause} (first: {counted.first[cause]})")


VERBS = {"data convert": Verb(Convert, data_convert, ("source", "out"))}
