"""Verbs that look at shards: `mmllm data check`, `mmllm data show`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm.progress import say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Check:
    """Look for faults in raw or token shards; exit code 1 where there is one."""

    folder: Path
    """Folder of raw shards or of token shards."""
    quick: bool = False
    """Headers and indexes alone: no picture is decoded and no id read."""
    processes: int = 1
    """Processes, a shard at a time each."""
    fix: Path | None = None
    """A new folder for the good samples of raw shards, in shards of the same names."""
    json: Path | None = None
    """A file for the report."""
    max_pixels: int = 64_000_000
    """Largest picture that is no fault."""
    min_side: int = 1
    """Shortest side of a picture that is no fault, in pixels."""
    max_aspect: float = 20.0
    """Longest side over the shortest of a picture that is no fault."""
    animated: Literal["first", "refuse"] = "first"
    """A picture of several frames: its first one, or none."""


def data_check(args: Check) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from data.check import check
    from data.images import Limits
    from mmllm.launch import RankFailed
    from mmllm.progress import Progress

    limits = Limits(max_pixels=args.max_pixels, min_side=args.min_side, max_aspect=args.max_aspect, animated=args.animated)
    try:
        with Progress("checking", "shards") as progress:
            report = check(args.folder, quick=args.quick, limits=limits, processes=args.processes, fix=args.fix, progress=progress)
    except BrokenProcessPool as error:
        raise RankFailed("a checking process was killed (out of memory?): give fewer --processes") from error
    for finding in report.findings:
        say(str(finding))
    if args.json is not None:
        args.json.write_text(report.to_json())
    say(f"{report.num_shards:,} {report.kind} shards, {report.num_samples:,} samples, {report.num_good:,} good"
        + "".join(f"; {count:,} × {cause}" for cause, count in report.counts.items()))
    if report.written is not None:
        say(f"{sum(report.written.values()):,} samples in {len(report.written):,} shards → {args.fix}; "
            f"left out: {report.num_samples - report.num_good:,} samples, and what no sample could be made of")
    if report.findings:
        raise SystemExit(1)


@dataclass(frozen=True, kw_only=True)
class Show:
    """A page about raw shards (documents) or token shards (packed rows, token by token)."""

    folder: Path
    """Folder of raw shards or of token shards."""
    out: Path
    """The .html file to write; it needs nothing beside it."""
    rows: int = 4
    """Packed rows of token shards that are shown."""
    documents: int = 24
    """Documents of raw shards that are shown."""
    prefix: str = ""
    """Shards whose name starts so."""
    raw: Path | None = None
    """Raw shards that the token shards were made of: shows originals beside tokens."""
    tokenizer: Path | None = None
    """Visual tokenizer that made the token shards: shows what is left of pictures."""
    text: Path | None = None
    """Text tokenizer that made them, a text.model file: shows pieces instead of numbers."""
    row_len: int = 2048
    """Tokens in a packed row."""
    seed: int = 0
    """Of the order, and of every choice a document needs."""
    long_documents: Literal["refuse", "drop", "split", "truncate"] = "split"
    """What becomes of a document longer than a row."""


def data_show(args: Show) -> None:
    from data.config import DataConfig
    from data.show import show

    if args.rows < 1 or args.documents < 1:
        raise ValueError(f"--rows {args.rows} and --documents {args.documents} must be at least 1")
    config = DataConfig(prefix=args.prefix, row_len=args.row_len, seed=args.seed, long_documents=args.long_documents)
    page = show(args.folder, args.out, config, rows=args.rows, documents=args.documents, raw=args.raw, tokenizer=args.tokenizer,
                text=args.text)
    say(f"page: {page}")


VERBS = {
    "data check": Verb(Check, data_check, ("folder",)),
    "data show": Verb(Show, data_show, ("folder", "out")),
}
