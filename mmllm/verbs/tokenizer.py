"""Verbs on tokenizers: `mmllm text-tokenizer …`, `mmllm tokenizer …`."""

from dataclasses import dataclass
from pathlib import Path

from mmllm.progress import say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class TrainText:
    """Train a SentencePiece model on the texts of raw shards."""

    raw: Path
    """Folder of raw shards."""
    out: Path
    """The text.model file to write."""
    size: int = 512
    """Pieces, 256 bytes included."""


def text_train(args: TrainText) -> None:
    from data import shards
    from data.document import texts_of
    from tokenizer import text

    model = text.train((t for d in shards.read_all(shards.find(args.raw, "train-")) for t in texts_of(d)), args.size)
    model.save(args.out)
    say(f"{model.size} pieces → {args.out}")


@dataclass(frozen=True, kw_only=True)
class EvalVisual:
    """Reconstruction and codebook use of a visual tokenizer on raw shards."""

    tokenizer: Path
    """Visual tokenizer, a folder."""
    raw: Path
    """Folder of raw shards."""
    prefix: str = "seen-"
    """Shards whose name starts so."""


def tokenizer_eval(args: EvalVisual) -> None:
    import json

    from mmllm.evaluate.measure import tokenizer_scores
    from mmllm.runs.train_tokenizer import pairs
    from tokenizer.model import VisualTokenizer

    say(json.dumps(tokenizer_scores(VisualTokenizer.load(args.tokenizer), pairs(args.raw, args.prefix)[0])[0], indent=1))


VERBS = {
    "text-tokenizer train": Verb(TrainText, text_train),
    "tokenizer eval": Verb(EvalVisual, tokenizer_eval, ("tokenizer", "raw")),
}
