"""Verbs on tokenizers: `mmllm text-tokenizer …`, `mmllm tokenizer …`."""

from dataclasses import dataclass
from pathlib import Path

from mmllm.evaluate.settings import VisualEvaluation
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
class EvalVisual(VisualEvaluation):
    """Measure a visual tokenizer on photographs or shards: eval.json and a page with pictures."""

    model: Path
    """Visual tokenizer, a folder."""
    source: Path
    """Folder of pictures (captions are not needed), of img2dataset's tars, or of raw shards."""
    out: Path
    """Folder for eval.json and eval.html."""


def tokenizer_eval(args: EvalVisual) -> None:
    import json

    from mmllm.evaluate.visual import evaluate_visual
    from mmllm.progress import Progress

    with Progress("evaluation", "pictures") as progress:
        record = evaluate_visual(args.model, args.source, args.out, args, progress)
    say(json.dumps({name: value for name, value in record["scores"].items() if isinstance(value, float)}, indent=1))
    for what, why in record["not_measured"].items():
        say(f"{what}: not measured, {why}")
    if skipped := record["source"]["skipped"]:
        say(f"{len(skipped)} pictures were refused, the first: {skipped[0]['name']}: {skipped[0]['reason']}")
    say(f"page: {args.out / 'eval.html'}")


@dataclass(frozen=True, kw_only=True)
class EncodePicture:
    """A picture → its codes, an .npy file [M, h, w]."""

    model: Path
    """Visual tokenizer, a folder."""
    picture: Path
    """Picture file."""
    out: Path
    """The .npy file to write."""
    scale: int = 1
    """Scale, one of the tokenizer's."""


def encode_picture(args: EncodePicture) -> None:
    import numpy as np

    from data.images import fitted, to_array, to_tensor
    from tokenizer.model import VisualTokenizer

    visual = VisualTokenizer.load(args.model)
    codes = visual.encode(to_tensor(to_array(fitted(args.picture, visual.sizes))[None]), args.scale)[0].numpy()
    np.save(args.out, codes)
    say(f"{codes.shape[0]} books x {codes.shape[1]} x {codes.shape[2]} codes -> {args.out}")


@dataclass(frozen=True, kw_only=True)
class DecodePicture:
    """Codes, an .npy file [M, h, w] → a picture."""

    model: Path
    """Visual tokenizer, a folder."""
    codes: Path
    """The .npy file."""
    out: Path
    """Picture file to write."""
    scale: int = 1
    """Scale that the codes were made at."""


def decode_picture(args: DecodePicture) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from data.images import to_uint8
    from tokenizer.model import VisualTokenizer

    visual, codes = VisualTokenizer.load(args.model), np.load(args.codes)
    if codes.ndim != 3 or codes.shape[0] != visual.num_books or not 0 <= codes.min() <= codes.max() < visual.codebook_size:
        raise ValueError(f"{args.codes} holds {codes.dtype} {list(codes.shape)} with values {codes.min()} to {codes.max()}, not codes "
                         f"[{visual.num_books}, h, w] in [0, {visual.codebook_size})")
    Image.fromarray(to_uint8(visual.decode(torch.from_numpy(codes)[None], args.scale))[0]).save(args.out)
    say(str(args.out))


VERBS = {
    "tokenizer encode": Verb(EncodePicture, encode_picture, ("model", "picture")),
    "tokenizer decode": Verb(DecodePicture, decode_picture, ("model", "codes")),
    "text-tokenizer train": Verb(TrainText, text_train),
    "tokenizer eval": Verb(EvalVisual, tokenizer_eval, ("model", "source")),
}
