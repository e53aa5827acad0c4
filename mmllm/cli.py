"""`mmllm VERB …`: one function a verb, its arguments the fields of a dataclass, its help their docstrings.

What is wrong with the input is one line and exit code 2; `--debug`, before or behind the verb, shows the traceback.
Heavy imports wait until a verb needs them.
"""

import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.launch import DEBUG_VARIABLE, USER_ERROR, RankFailed

RECIPES = Path(__file__).parent.parent / "recipes"
LEVELS = {"2": "quickstart_level2", "3": "quickstart_level3"}


def recipe_of(name: str, kind: type) -> Any:
    """RECIPE of a Python file, named by path or as a file of recipes/."""
    path = Path(name) if name.endswith(".py") else RECIPES / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.py") if p.stem != "__init__"))
        raise FileNotFoundError(f"there is no recipe {name}: give a .py file, or one of {known}")
    recipe = runpy.run_path(str(path)).get("RECIPE")
    if not isinstance(recipe, kind):
        raise ValueError(f"{path} holds no RECIPE of type {kind.__name__}, which this command runs")
    return recipe


def _with_recipe(words: list[str], verb: str, kind: type, default: str | None = None) -> Any:
    """`RECIPE --field value …` → the recipe with those fields."""
    import tyro

    if words and not words[0].startswith("-"):
        name, *words = words
    elif default is not None:
        name = default
    elif words and words[0] in ("-h", "--help"):
        tyro.cli(kind, args=words, prog=f"mmllm {verb} RECIPE")
        raise SystemExit(0)
    else:
        raise ValueError(f"mmllm {verb} needs a recipe: a .py file, or a name in recipes/")
    return tyro.cli(kind, default=recipe_of(name, kind), args=words, prog=f"mmllm {verb} {name}")


def quickstart(words: list[str]) -> None:
    """The whole pipeline on this machine; ends with a report to look at. --fast, --level 1|2|3 and --data choose the recipe."""
    from mmllm.runs.quickstart import Quickstart, main

    name = "quickstart"
    for number, word in enumerate(words):
        if word == "--fast":
            name = "quickstart_fast"
        elif word == "--data" or word.startswith("--data="):
            name = "quickstart_pictures"
        elif word.startswith("--level="):
            name = LEVELS.get(word.partition("=")[2], name)
        elif word == "--level" and number + 1 < len(words):
            name = LEVELS.get(words[number + 1], name)
    words = [word for word in words if word != "--fast"]
    main(_with_recipe(words, "quickstart", Quickstart, name))


def pretrain(words: list[str]) -> None:
    """Pretrain a decoder on token shards with megatron-core: RECIPE --field value …"""
    from mmllm.config import Pretrain
    from mmllm.runs.pretrain import main

    say(f"last checkpoint: {main(_with_recipe(words, 'pretrain', Pretrain))}")


def sft(words: list[str]) -> None:
    """Instruction tuning of a model folder with DeepSpeed: RECIPE --field value …"""
    from mmllm.runs.sft import Sft, main

    say(f"tuned model: {main(_with_recipe(words, 'sft', Sft))}")


def tokenizer_train(words: list[str]) -> None:
    """Train teacher and visual tokenizer on the pairs of raw shards."""
    import tyro

    from mmllm.runs.train_tokenizer import TrainVisual, main

    say(f"visual tokenizer: {main(tyro.cli(TrainVisual, args=words, prog='mmllm tokenizer train'))}")


def say(line: str) -> None:
    print(line, flush=True)


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
    from data.loader import DataConfig
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
    from data.images import fit, load_image, to_array, to_tensor
    from mmllm.generate.engine import Engine

    picture = load_image(args.picture)
    engine = Engine.load(args.model)
    say(engine.describe(to_tensor(to_array(fit(picture, engine.visual.image_size))[None]), args.question)[0])


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


DATACLASS_VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "data scenes": (Scenes, data_scenes), "data convert": (Convert, data_convert), "data encode": (Encode, data_encode),
    "text-tokenizer train": (TrainText, text_train), "tokenizer eval": (EvalVisual, tokenizer_eval), "export": (Export, export_model),
    "generate": (Generate, generate), "describe": (Describe, describe), "chat": (Chat, chat),
}
POSITIONAL = {"export": ("checkpoint",), "generate": ("model", "prompt"), "describe": ("model", "picture", "question"),
              "chat": ("model",), "tokenizer eval": ("tokenizer", "raw")}
RECIPE_VERBS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart, "tokenizer train": tokenizer_train, "pretrain": pretrain, "sft": sft}


def usage() -> str:
    lines = ["mmllm: a language model that sees and draws, from raw shards to chat", "", "  mmllm VERB --help", ""]
    lines += [f"  {verb:<22}{(run.__doc__ or '').splitlines()[0]}" for verb, run in RECIPE_VERBS.items()]
    lines += [f"  {verb:<22}{(kind.__doc__ or '').splitlines()[0]}" for verb, (kind, _) in DATACLASS_VERBS.items()]
    return "\n".join(lines)


def run(words: list[str]) -> None:
    """Run one command line, without the program's name."""
    if not words or words[0] in ("-h", "--help"):
        say(usage())
        return
    for count in (2, 1):
        verb, rest = " ".join(words[:count]), words[count:]
        if verb in RECIPE_VERBS:
            RECIPE_VERBS[verb](rest)
            return
        if verb in DATACLASS_VERBS:
            import tyro

            kind, function = DATACLASS_VERBS[verb]
            function(tyro.cli(kind, args=_named(rest, POSITIONAL.get(verb, ())), prog=f"mmllm {verb}"))
            return
    raise ValueError(f"there is no verb {' '.join(words[:2])!r}; `mmllm --help` lists them")


def _named(words: list[str], names: tuple[str, ...]) -> list[str]:
    """Leading plain words become the named fields."""
    out = list[str]()
    rest = list(words)
    for name in names:
        if not rest or rest[0].startswith("-"):
            break
        out += [f"--{name}", rest.pop(0)]
    return out + rest


def main() -> None:
    words = sys.argv[1:]
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        run(words)
    except (ValueError, FileNotFoundError, RankFailed) as error:
        if debug:
            raise
        print(f"mmllm: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RankFailed) else USER_ERROR) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
