"""Verbs on a trained model: export it, draw, describe, chat."""

from dataclasses import dataclass
from pathlib import Path

from mmllm.progress import say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Export:
    """A pretraining checkpoint → a Hugging Face model folder."""

    checkpoint: Path
    """Folder such as runs/NAME/checkpoints/step_0001000."""
    out: Path
    """Model folder to write."""
    tokens: Path
    """Token shards that the model was trained on."""
    tokenizer: Path
    """Visual tokenizer that made them."""
    text: Path
    """Text tokenizer that made them."""


def export_model(args: Export) -> None:
    from data.config import DataConfig
    from mmllm.export import export

    say(f"model folder: {export(args.checkpoint, args.out, DataConfig(shards=args.tokens), args.text, args.tokenizer)}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw pictures for a prompt."""

    model: Path
    """Model folder."""
    prompt: str
    """What to draw."""
    out: Path = Path("picture.png")
    """Picture file; several are numbered."""
    n: int = 1
    """Pictures to draw."""
    guidance: float = 1.0
    """How much more than without the text; 1 is none."""
    temperature: float = 0.3
    """Of the image codes; 0 takes the likeliest."""
    seed: int = 0
    """Same seed, same picture."""
    scale: int = 8
    """Screen pixels for a picture's pixel."""


def generate(args: Generate) -> None:
    from PIL import Image

    from data.images import to_uint8
    from mmllm.generate.engine import Engine
    from mmllm.generate.sample import Sampling

    if args.n < 1 or args.scale < 1:
        raise ValueError(f"--n {args.n} and --scale {args.scale} must be at least 1")
    engine = Engine.load(args.model)
    codes = engine.draw([args.prompt], n=args.n, guidance=args.guidance, sampling=Sampling(temperature=args.temperature), seed=args.seed)
    for number, picture in enumerate(to_uint8(engine.pictures(codes[0]))):
        path = args.out if args.n == 1 else args.out.with_stem(f"{args.out.stem}-{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = picture.shape[:2]
        Image.fromarray(picture).resize((width * args.scale, height * args.scale), Image.Resampling.NEAREST).save(path)
        say(str(path))


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Describe a picture, or answer a question about it."""

    model: Path
    """Model folder."""
    picture: Path
    """Picture file."""
    question: str | None = None
    """A question; none asks for a description."""


def describe(args: Describe) -> None:
    from data.images import fitted, load_image, to_array, to_tensor
    from data.tokens import sizes_of
    from mmllm.generate.engine import Engine

    load_image(args.picture)  # refused, if it is, before a model is loaded
    engine = Engine.load(args.model)
    say(engine.describe(to_tensor(to_array(fitted(args.picture, sizes_of(engine.visual)))[None]), args.question)[0])


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Chat in the terminal: text and pictures in, text and pictures out."""

    model: Path
    """Tuned model folder."""
    out: Path = Path("pictures")
    """Folder for what it draws."""
    seed: int = 0
    """Of its pictures."""
    guidance: float = 1.0
    """How much more than without the text; 1 is none."""
    temperature: float = 0.3
    """Of the image codes; 0 takes the likeliest."""


def chat(args: Chat) -> None:
    from mmllm.serve.chat import main

    main(args.model, args.out, args.seed, args.guidance, args.temperature)


VERBS = {
    "export": Verb(Export, export_model, ("checkpoint",)),
    "generate": Verb(Generate, generate, ("model", "prompt")),
    "describe": Verb(Describe, describe, ("model", "picture", "question")),
    "chat": Verb(Chat, chat, ("model",)),
}
