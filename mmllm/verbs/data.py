"""Verbs on shards: `mmllm data …`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm.progress import say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Draw scenes with captions and questions into raw shards."""

    out: Path
    """Folder for SPLIT-000000.tar, …"""
    level: int = 1
    """1 in cells, 2 finer with more objects, 3 free with textures."""
    seed: int = 0
    """Of the scenes."""
    train: int = 30_000
    """Documents to train on."""
    held: int = 512
    """Documents of each held-out split."""


def data_scenes(args: Scenes) -> None:
    from data.scenes import shards as scene_shards
    from mmllm.progress import Progress

    with Progress("scenes", "shards") as progress:
        scene_shards.write(args.out, args.level, args.seed, args.train, args.held, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Raw shards → token shards; continues where it was interrupted."""

    raw: Path
    """Folder of raw shards."""
    out: Path
    """Folder for token shards, their index and manifest."""
    tokenizer: Path
    """Visual tokenizer, a folder."""
    text: Path
    """Text tokenizer, a text.model file."""
    processes: int = 1
    """Processes, each with its share of the shards, the cores and the GPUs."""
    node: int = 0
    """Number of this machine among `nodes` that encode the same folder into the same folder."""
    nodes: int = 1
    """Machines at work; the last to end writes the manifest."""
    batch_len: int = 256
    """Pictures that are encoded at once."""
    scale: int = 1
    """Of a tokenizer with several scales, the one whose codes are written; a folder for each."""
    max_bad: float = 0.0
    """Largest share of a shard's documents that may be left out, rounded up to whole documents."""
    max_pixels: int = 64_000_000
    """Largest picture that is decoded."""
    min_side: int = 1
    """Shortest side of a picture that is taken, in pixels."""
    max_aspect: float = 20.0
    """Longest side over the shortest of a picture that is taken."""
    animated: Literal["first", "refuse"] = "first"
    """A picture of several frames: its first one, or none."""


def data_encode(args: Encode) -> None:
    from data import shards
    from data.encode import ProcessFailed, encode, vocab_of
    from data.images import Limits
    from mmllm.launch import RankFailed
    from mmllm.progress import Progress
    from tokenizer.model import VisualTokenizer
    from tokenizer.text import TextTokenizer

    visual, text = VisualTokenizer.load(args.tokenizer), TextTokenizer.load(args.text)
    vocab = vocab_of(visual, text)
    limits = Limits(max_pixels=args.max_pixels, min_side=args.min_side, max_aspect=args.max_aspect, animated=args.animated)
    try:
        with Progress("encoding", "shards") as progress:
            manifest = encode(shards.find(args.raw), args.out, args.tokenizer, args.text, vocab, progress, processes=args.processes,
                              max_bad=args.max_bad, batch_len=args.batch_len, limits=limits, scale=args.scale, node=(args.node, args.nodes))
    except ProcessFailed as error:
        raise RankFailed(str(error)) from error
    if not manifest.exists():
        say(f"node {args.node} is done; the last of {args.nodes} nodes to end writes {manifest}")
        return
    skipped = json.loads(manifest.read_text())["skipped"]
    say(f"manifest: {manifest}" + "".join(f"; left out: {count} × {cause}" for cause, count in skipped.items()))


VERBS = {
    "data scenes": Verb(Scenes, data_scenes),
    "data encode": Verb(Encode, data_encode, ("raw", "out")),
}
