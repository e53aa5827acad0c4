"""Verbs on a model: import one to go on from, export what was trained, draw, describe, chat."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from mmllm.progress import Progress, say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Import:
    """A Hugging Face Llama, Qwen2, Qwen3 or Qwen3-MoE folder → a checkpoint to start from, its vocabulary extended."""

    base: Path
    """Hugging Face folder: config.json, safetensors, tokenizer.json."""
    out: Path
    """Folder to write: `init` of a pretraining recipe; its text.model is the text tokenizer to encode shards with."""
    tokenizer: Path
    """Visual tokenizer whose image codes are added."""
    init_rows: Path | None = None
    """A safetensors file of new rows to start from: `ids` [n], `rows` [n, hidden], and for the output layer `output_rows`."""
    noise: float = 0.1
    """Around the mean row that a new one starts from, in standard deviations of the base's rows."""
    seed: int = 0
    """Of the noise."""


def import_model(args: Import) -> None:
    from mmllm.adopt import adopt

    model = adopt(args.base, args.out, args.tokenizer, args.init_rows, args.noise, args.seed)
    shown = ", ".join(f"{field.name}={value!r}" for field in fields(model) if (value := getattr(model, field.name)) != field.default)
    say(f"checkpoint: {args.out}, for a recipe with init=Path({str(args.out)!r}) and\nmodel=Model({shown})")


@dataclass(frozen=True, kw_only=True)
class Export:
    """A pretraining checkpoint → a Hugging Face model folder."""

    checkpoint: Path
    """Folder such as runs/NAME/checkpoints/step_0001000, or what `mmllm import` wrote."""
    out: Path
    """Model folder to write."""
    tokens: Path | None = None
    """Token shards that the model was trained on; only what `mmllm import` wrote needs none."""
    tokenizer: Path
    """Visual tokenizer that made them."""
    text: Path | None = None
    """Text tokenizer that made them; likewise."""
    dtype: Literal["saved", "bf16", "fp32"] = "saved"
    """Precision of the weights: that of the checkpoint, or another."""


def export_model(args: Export) -> None:
    import torch

    from data.config import DataConfig
    from mmllm.export import export

    data = DataConfig(shards=args.tokens) if args.tokens is not None else None
    dtype = {"saved": None, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    say(f"model folder: {export(args.checkpoint, args.out, data, args.text, args.tokenizer, dtype)}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Draw pictures for a prompt, or for each of a file."""

    model: Path
    """Model folder."""
    prompt: str = ""
    """What to draw."""
    prompts: Path | None = None
    """Instead, a jsonl file of {"prompt": …} lines, each with "id", "n", "guidance", "temperature", "top_k", "top_p", "seed", "negative",
    "grid" or "best_of" where it wants its own. Goes on where it was stopped."""
    out: Path = Path("picture.png")
    """Picture file; several are numbered. Of a file of prompts, the folder."""
    n: int = 1
    """Pictures to draw."""
    guidance: float = 1.0
    """How much more than without the text; 1 is none."""
    temperature: float = 0.3
    """Of the image codes; 0 takes the likeliest."""
    top_k: int = 0
    """Only the k likeliest codes; 0 keeps all."""
    top_p: float = 1.0
    """Only the likeliest codes that together reach this probability."""
    negative: str = ""
    """What guidance leads away from."""
    seed: int = 0
    """Same seed, same picture."""
    grid: tuple[int, int] | None = None
    """Rows and columns of codes; the model's first if not given."""
    best_of: int = 0
    """Draw so many and keep the n that the model itself judges best; 0 draws n."""
    ahead: int = 0
    """Codes looked at in a pass (speculative Jacobi decoding): fewer passes, the same distribution, other pictures for a seed. 0 takes one
    after another."""
    ahead_delta: float = 0.0
    """How far (total variation) a code's distribution may be from the model's for still fewer passes; look-alikes are exchanged only."""
    int8: bool = False
    """Weights in a byte each: a quarter of the memory."""
    scale: int = 8
    """Screen pixels for a picture's pixel."""


def generate(args: Generate) -> None:
    from mmllm.generate import jobs
    from mmllm.generate.engine import Engine
    from mmllm.generate.speculate import Speculation

    if args.scale < 1 or args.ahead < 0:
        raise ValueError(f"--scale {args.scale} must be at least 1, --ahead {args.ahead} at least 0")
    if args.ahead_delta and not args.ahead:
        raise ValueError(f"--ahead-delta {args.ahead_delta} loosens what --ahead looks at, which is 0: give --ahead too")
    if bool(args.prompt) == (args.prompts is not None):
        raise ValueError("give a prompt, or a file of --prompts")
    how = jobs.Drawing(n=args.n, guidance=args.guidance, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                       negative=args.negative, grid=args.grid, best_of=args.best_of)
    ahead = Speculation(window=args.ahead, delta=args.ahead_delta) if args.ahead else None
    engine = Engine.load(args.model, int8=args.int8)
    if args.prompts is not None:
        with Progress("drawing", "prompts") as tell:
            done = jobs.generate(engine, args.prompts, args.out, how, args.scale, ahead, tell)
        say(f"{done:,} prompts drawn; {args.out}/pictures.jsonl")
        return
    codes, _ = jobs.draw(engine, [args.prompt], [how], ahead)[0]
    for number, one in enumerate(codes):
        path = args.out if args.n == 1 else args.out.with_stem(f"{args.out.stem}-{number}")
        jobs.save(engine, one, path, args.scale)
        say(str(path))


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Describe a picture, or answer a question about it; or do so for many."""

    model: Path
    """Model folder."""
    picture: Path
    """Picture file; or a folder of them, or a jsonl file of {"picture": …} lines, each with "id" and "question" where it wants its own."""
    question: str | None = None
    """A question; none asks for a description."""
    out: Path = Path("descriptions.jsonl")
    """Of many: the jsonl file. Goes on where it was stopped."""
    int8: bool = False
    """Weights in a byte each: a quarter of the memory."""


def describe(args: Describe) -> None:
    from data.images import fitted, load_image, to_array, to_tensor
    from data.tokens import sizes_of
    from mmllm.generate import jobs
    from mmllm.generate.engine import Engine

    if args.picture.is_dir() or args.picture.suffix == ".jsonl":
        engine = Engine.load(args.model, int8=args.int8)
        with Progress("describing", "pictures") as tell:
            done = jobs.describe(engine, args.picture, args.out, args.question, tell)
        say(f"{done:,} pictures described; {args.out}")
        return
    load_image(args.picture)  # refused, if it is, before a model is loaded
    engine = Engine.load(args.model, int8=args.int8)
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
    "import": Verb(Import, import_model, ("base", "out")),
    "export": Verb(Export, export_model, ("checkpoint", "out")),
    "generate": Verb(Generate, generate, ("model", "prompt")),
    "describe": Verb(Describe, describe, ("model", "picture", "question")),
    "chat": Verb(Chat, chat, ("model",)),
}
