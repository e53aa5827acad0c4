"""Verbs on shards: `mmllm data …`."""

from dataclasses import dataclass
from pathlib import Path

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
    from data import scene_shards
    from mmllm.progress import Progress

    with Progress("scenes", "shards") as progress:
        scene_shards.write(args.out, args.level, args.seed, args.train, args.held, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Pictures with captions → raw shards."""

    source: Path
    """Folder of x.png with x.txt, or of img2dataset tar shards."""
    out: Path
    """Folder for train-*.tar and seen-*.tar."""
    size: int = 32
    """Side of the square pictures, in pixels."""
    held: float = 0.05
    """Share of the pairs that is held out."""
    max_bad: float = 0.05
    """Largest share of samples that may be skipped."""
    max_pixels: int = 64_000_000
    """Largest picture that is decoded."""


def data_convert(args: Convert) -> None:
    from data.convert import convert

    train, held, skipped = convert(args.source, args.out, args.size, args.held, args.max_bad, args.max_pixels)
    say(f"{train:,} pairs to train on, {held:,} held out; skipped: {skipped or 'none'}")


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


def data_encode(args: Encode) -> None:
    from data import shards
    from data.encode import encode
    from data.vocab import Vocab
    from mmllm.progress import Progress
    from tokenizer.model import VisualTokenizer
    from tokenizer.text import TextTokenizer

    visual, text = VisualTokenizer.load(args.tokenizer), TextTokenizer.load(args.text)
    vocab = Vocab(text.size, visual.codebook_size, visual.num_books, (visual.grid,))
    with Progress("encoding", "shards") as progress:
        say(f"manifest: {encode(shards.find(args.raw), args.out, visual, text, vocab, progress)}")


VERBS = {
    "data scenes": Verb(Scenes, data_scenes),
    "data convert": Verb(Convert, data_convert),
    "data encode": Verb(Encode, data_encode),
}
