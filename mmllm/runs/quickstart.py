"""The whole pipeline on one machine: raw shards to a model that describes and draws, and a report to look at.

    data → text tokenizer → teacher → visual tokenizer → token shards → pretraining → export → tuning → evaluation → report

Each stage is what its own command runs. A stage that ended is not run again: the same command continues after an
interruption, and a changed recipe is refused rather than mixed with what is there.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from data import shards
from data.chat import DESCRIBE_REQUESTS, DRAW_REQUESTS
from data.config import DataConfig
from data.convert import convert
from data.convert_piece import Conversion
from data.document import texts_of
from data.encode import encode, fingerprint, vocab_of
from data.formats.keep import Keep
from data.formats.reading import Reading
from data.loader import Loader
from data.pairs import Pairs
from data.scenes import shards as scene_shards
from data.scenes.world import World
from data.vocab import Vocab
from mmllm.config import Model, Optim, Parallel, Pretrain
from mmllm.evaluate import report
from mmllm.evaluate.measure import evaluate_pictures, evaluate_scenes
from mmllm.export import export
from mmllm.progress import Progress, say
from mmllm.run import write_json
from mmllm.runs import pretrain, sft, train_tokenizer
from mmllm.runs.sft import Sft
from mmllm.runs.tokenizer_recipe import TrainTokenizer, TrainVisual
from tokenizer import text as text_tokenizer
from tokenizer.model import VisualTokenizer
from tokenizer.quantize import SharedIndexQuantizer
from tokenizer.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Everything the quick start needs to know."""

    out: Path = Path("runs/quickstart")
    """Run folder; its report is report.html."""
    data: Path | None = None
    """Your own pictures with captions, in any format that `mmllm data convert` knows: a folder of x.png with x.txt, say. None draws
    scenes."""
    level: int = 1
    """World of the scenes: 1 in cells, 2 finer with more objects, 3 free with textures."""
    seed: int = 0
    """Of data, weights and every choice."""
    scenes: int = 30_000
    """Documents to train on."""
    held: int = 512
    """Documents of each split that is held out."""
    text_pieces: int = 512
    """Size of the text vocabulary, 256 bytes included."""
    tokenizer: TrainTokenizer = field(default_factory=TrainTokenizer)
    """Teacher and visual tokenizer."""
    model: Model = field(default_factory=lambda: Model(num_layers=4, hidden_size=128, num_attention_heads=4,
                                                       ffn_hidden_size=384, output_init_std=0.0))
    """The decoder."""
    parallel: Parallel = field(default_factory=lambda: Parallel(ranks=2))
    """How ranks share pretraining: two data-parallel ones."""
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-3, warmup_steps=100, hold_ratio=0.45, betas=(0.9, 0.98)))
    """Optimizer of pretraining."""
    row_len: int = 1024
    """Tokens in a packed row."""
    global_batch: int = 4
    """Rows a step, over all ranks."""
    steps: int = 2200
    """Optimizer steps of pretraining."""
    save_every: int = 500
    """Steps between checkpoints."""
    draw_ratio: float = 0.5
    """Share of pairs trained text → image."""
    answer_weight: float = 2.0
    """Of an answer to a question, beside other text: yes and no are learned all at once, and late without it."""
    text_loss_weight: float = 2.0
    """Weight of a text token in pretraining, an image token's being 1: answers are few among codes."""
    sft_steps: int = 100
    """Optimizer steps of instruction tuning."""
    sft_lr: float = 1e-3
    """Learning rate of instruction tuning."""
    prompts: int = 120
    """Prompts a skill and split, and pictures a split, in the evaluation."""

    def __post_init__(self) -> None:
        side = self.tokenizer.model.tower.image_size
        if self.data is None and World.at_level(self.level).image_size != side:
            raise ValueError(f"scenes of level {self.level} are {World.at_level(self.level).image_size} px wide, the tokenizer takes "
                             f"{side}: set tokenizer.model.tower.image_size, or use the recipe of that level")


def main(recipe: Quickstart) -> Path:
    """Run every stage that has not run. → the report."""
    out = recipe.out
    _claim(recipe)
    source = str(recipe.data) if recipe.data else f"scenes of level {recipe.level}"
    say(f"quick start on {source} → {out} ({os.cpu_count()} cores, seed {recipe.seed})")
    stages: list[tuple[str, Callable[[Quickstart], None]]] = [
        ("data", make_data), ("text tokenizer", make_text_tokenizer), ("teacher", make_teacher),
        ("visual tokenizer", make_visual_tokenizer), ("token shards", make_token_shards), ("pretraining", run_pretraining),
        ("export", run_export), ("instruction tuning", run_tuning), ("evaluation", run_evaluation), ("report", run_report)]
    for number, (name, stage) in enumerate(stages):
        done = _stages(out)
        if any(entry["name"] == name for entry in done):
            continue
        say(f"[{number + 1}/{len(stages)}] {name}")
        with _Peak() as peak:
            stage(recipe)
        done.append({"name": name, "seconds": round(peak.seconds, 2), "peak_memory_bytes": peak.bytes})
        write_json(out / "stages.json", done)
        say(f"      {peak.seconds:.0f} s, {peak.bytes / 2**30:.1f} GiB")
    run_report(recipe)  # with the time of the report's own stage
    total = sum(entry["seconds"] for entry in _stages(out))
    say(f"done in {total / 60:.1f} min of stages: open {out / 'report.html'}")
    return out / "report.html"


def _claim(recipe: Quickstart) -> None:
    """Mark the run folder as this recipe's. Errors: ValueError where it belongs to another."""
    if torch.cuda.is_available() and recipe.parallel.ranks > torch.cuda.device_count():
        raise ValueError(f"parallel.ranks is {recipe.parallel.ranks} but this machine has {torch.cuda.device_count()} GPU: "
                         f"give --parallel.ranks {torch.cuda.device_count()}")
    if recipe.data is not None and not recipe.data.exists():
        raise FileNotFoundError(f"--data {recipe.data} does not exist: name a folder of pictures with captions")
    fields = json.loads(json.dumps(asdict(replace(recipe, out=Path())), default=str))
    path = recipe.out / "recipe.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before != fields:
            changed = sorted(k for k in fields if before.get(k) != fields[k])
            raise ValueError(f"{recipe.out} holds a run of another recipe (different: {', '.join(changed)}): "
                             "choose another --out, or remove the folder to start anew")
        return
    if recipe.out.exists() and any(recipe.out.iterdir()):
        raise ValueError(f"{recipe.out} exists and is no quick-start run: choose another --out; nothing was written")
    recipe.out.mkdir(parents=True, exist_ok=True)
    write_json(path, fields)


def _stages(out: Path) -> list[dict[str, Any]]:
    path = out / "stages.json"
    return json.loads(path.read_text()) if path.exists() else []


class _Peak:
    """Seconds, and the largest memory of this process and its children together, sampled twice a second."""

    def __enter__(self) -> "_Peak":
        self.bytes, self.seconds, self._start, self._stop = 0, 0.0, time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss  # what ranks share, after a fork or of a library, counts once
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)
            if self._stop.wait(0.5):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start


# Stages -----------------------------------------------------------------------------------------------------------

def make_data(recipe: Quickstart) -> None:
    """Raw shards: scenes, or the pictures given."""
    folder = recipe.out / "raw"
    if recipe.data is None:
        with Progress("scenes", "shards") as progress:
            scene_shards.write(folder, recipe.level, recipe.seed, recipe.scenes, recipe.held, progress=progress)
        return
    how = Conversion(reading=Reading(keep=Keep(size=recipe.tokenizer.model.tower.image_size)))
    with Progress("converting", "pieces") as progress:
        found = convert(recipe.data, folder, how, progress)
    say(f"      {found.documents['train']:,} documents to train on, {found.documents['seen']:,} held out"
        + (f"; left out: {found.skipped}" if found.skipped else ""))


def make_text_tokenizer(recipe: Quickstart) -> None:
    texts = [words for document in shards.read_all(shards.find(recipe.out / "raw", "train-"))
             for words in texts_of(document)]
    asked = [*DRAW_REQUESTS, *DESCRIBE_REQUESTS] * max(1, len(texts) // 1000)  # what tuning adds
    model = text_tokenizer.train([*texts[::max(1, len(texts) // 50_000)], *asked], recipe.text_pieces)
    model.save(recipe.out / "text.model")
    say(f"      {model.size} pieces from {len(texts):,} texts")


def _text(recipe: Quickstart) -> TextTokenizer:
    return TextTokenizer.load(recipe.out / "text.model")


def visual_recipe(recipe: Quickstart) -> TrainVisual:
    return TrainVisual(raw=recipe.out / "raw", text=recipe.out / "text.model", out=recipe.out / "visual_tokenizer",
                       training=replace(recipe.tokenizer, seed=recipe.seed))


def make_teacher(recipe: Quickstart) -> None:
    training = visual_recipe(recipe)
    pairs = Pairs(shards.find(training.raw, "train-"), training.training.model.sizes, training.run / "index")
    train_tokenizer.make_teacher(training, pairs, _text(recipe))


def make_visual_tokenizer(recipe: Quickstart) -> None:
    train_tokenizer.main(visual_recipe(recipe))


def make_token_shards(recipe: Quickstart) -> None:
    visual, text = VisualTokenizer.load(recipe.out / "visual_tokenizer"), _text(recipe)
    vocab = vocab_of(visual, text)
    with Progress("encoding", "shards") as progress:
        encode(shards.find(recipe.out / "raw", "train-") + shards.find(recipe.out / "raw", "seen-"),
               recipe.out / "tokens", visual, text, vocab, progress)
    write_rows(recipe.out / "init_rows.safetensors", visual, vocab, recipe)


def write_rows(path: Path, visual: VisualTokenizer, vocab: Vocab, recipe: Quickstart) -> None:
    """Embedding rows to start from: a text piece is random, an image code is the mean of its phrase's rows and a random projection
    of what it looks like, so codes that mean or look alike begin alike."""
    width, std = recipe.model.hidden_size, recipe.model.init_std
    generator = torch.Generator().manual_seed(recipe.seed)
    rows = torch.randn(vocab.size, width, generator=generator)
    quantizer = visual.quantizer
    assert isinstance(quantizer, SharedIndexQuantizer), "the quick start's tokenizers have books that look like something"
    for book in range(visual.num_books):
        first = vocab.first_image + book * vocab.codebook_size
        table, words = quantizer.rows(book)[1], quantizer.words(book)
        look = (table - table.mean(0)) / table.std().clamp_min(1e-6)
        look = look @ torch.randn(look.shape[1], width, generator=generator) / look.shape[1]**0.5
        rows[first:first + vocab.codebook_size] = look + (rows[words].mean(1) if words is not None else 0)
    safetensors.torch.save_file({"rows": rows * std, "ids": torch.arange(vocab.size)}, path)


def data_config(recipe: Quickstart) -> DataConfig:
    return DataConfig(shards=recipe.out / "tokens", row_len=recipe.row_len, seed=recipe.seed, draw_ratio=recipe.draw_ratio,
                      answer_weight=recipe.answer_weight)


def pretrain_recipe(recipe: Quickstart) -> Pretrain:
    return Pretrain(out=recipe.out / "pretrain", steps=recipe.steps, global_batch=recipe.global_batch,
                    micro_batch=recipe.global_batch // max(1, recipe.parallel.dp), model=recipe.model, optim=recipe.optim,
                    data=data_config(recipe), parallel=recipe.parallel, seed=recipe.seed, save_every=recipe.save_every,
                    text_loss_weight=recipe.text_loss_weight,
                    init_rows=recipe.out / "init_rows.safetensors", log_every=20)


def run_pretraining(recipe: Quickstart) -> None:
    training = pretrain_recipe(recipe)
    Loader(training.data, _fingerprint(recipe))  # shards of other tokenizers are refused before ranks start
    pretrain.main(training)


def _fingerprint(recipe: Quickstart) -> str:
    visual, text = VisualTokenizer.load(recipe.out / "visual_tokenizer"), _text(recipe)
    vocab = vocab_of(visual, text)
    return fingerprint(visual.fingerprint, text.fingerprint, vocab)


def run_export(recipe: Quickstart) -> None:
    export(recipe.out / "pretrain" / "checkpoints" / f"step_{recipe.steps:07d}", recipe.out / "pretrain" / "hf",
           data_config(recipe), recipe.out / "text.model", recipe.out / "visual_tokenizer")


def sft_recipe(recipe: Quickstart) -> Sft:
    ranks = recipe.parallel.ranks
    return Sft(out=recipe.out / "sft", init=recipe.out / "pretrain" / "hf", data=replace(data_config(recipe), seed=recipe.seed + 1),
               steps=recipe.sft_steps, global_batch=max(recipe.global_batch, ranks), lr=recipe.sft_lr,
               warmup_steps=recipe.sft_steps // 10, ranks=ranks, seed=recipe.seed, log_every=20)


def run_tuning(recipe: Quickstart) -> None:
    sft.main(sft_recipe(recipe))


def run_evaluation(recipe: Quickstart) -> None:
    if recipe.data is None:
        scores, examples = evaluate_scenes(recipe.out, recipe.level, recipe.prompts, recipe.seed)
    else:
        scores, examples = evaluate_pictures(recipe.out, 2 * recipe.prompts, recipe.seed)
    write_json(recipe.out / "examples.json", examples)
    write_json(recipe.out / "scores.json", scores)
    for room, values in scores.items():
        say(f"      {room}: {_short(values)}")


def _short(values: object) -> str:
    """Scores on a line."""
    if isinstance(values, float):
        return f"{values:.3g}"
    if isinstance(values, dict):
        return ", ".join(f"{k} {_short(v)}" if not isinstance(v, dict) else f"{k} ({_short(v)})" for k, v in values.items()
                         if not isinstance(v, list))
    return str(values)


def run_report(recipe: Quickstart) -> None:
    report.write(recipe.out)
