"""Variants of one recipe of the visual tokenizer, trained on scenes and measured alike: a table, as markdown and JSON.

    mmllm data scenes --out runs/scenes
    mmllm text-tokenizer train --raw runs/scenes --out runs/scenes/text.model
    python tools/tokenizer_ablation.py runs/scenes runs/scenes/text.model runs/ablation --steps 300 --seeds 0 1 2

A variant changes one thing. All share one teacher, OUT/teacher.safetensors, trained by the first run if it is not there. A run that is in
OUT/runs.json is not run again: the same command continues, and another one adds to the table.

Letters: n pictures, p positions of them, M books, K entries, c teacher width, d dims.
"""

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.images import to_tensor, to_uint8
from data.scenes.detector import detect, scene_matches
from data.scenes.image import render
from data.scenes.text import describe
from data.scenes.world import Scene, World
from mmllm.cli import recipe_of
from mmllm.run import write_json
from mmllm.runs.tokenizer_recipe import Perturb, TrainTokenizer, TrainVisual, violations
from mmllm.runs.train_tokenizer import main as train
from tokenizer import metrics
from tokenizer.metrics import Moments
from tokenizer.model import VisualTokenizer
from tokenizer.perturb import perturb_codes
from tokenizer.semantic import Teacher, recall_at_1
from tokenizer.text import TextTokenizer

Pictures = NDArray[np.uint8]
HELD, READ, AMONG = 2048, 1024, 64
"""Pictures measured, of which so many by detector and Fréchet distances; captions of which one is to be found."""
GRID = ((0.25, 20), (0.5, 5))
"""(α, δ) of the perturbed distance: share of codes replaced, neighbours to choose from."""
ENTROPY = 0.02
"""Weight of the entropy term where rows cannot be revived."""

Change = Callable[[TrainTokenizer], TrainTokenizer]


def quantizer(**fields: Any) -> Change:
    return lambda t: replace(t, model=replace(t.model, quantizer=replace(t.model.quantizer, **fields)))


def align(**weights: float) -> Change:
    return lambda t: replace(t, align=replace(t.align, weights=replace(t.align.weights, **weights)))


def both(first: Change, second: Change) -> Change:
    return lambda t: second(first(t))


def books(count: int, size: int) -> Change:
    """The same 32 semantic and 16 pixel dims in `count` books."""
    return quantizer(pixel_dims=(16 // count,) * count, semantic_dim=32 // count, codebook_size=size)


def decode(beta: float) -> Change:
    """Half as many steps of the second stage, in which codes are perturbed or not."""
    return lambda t: replace(t, decode=replace(t.decode, steps=t.align.steps // 2, perturb=Perturb(beta=beta, neighbours=20)))


VARIANTS: dict[str, dict[str, Change]] = {
    "base": {"base": lambda t: t},
    "books": {"M=1": books(1, 256), "M=2": books(2, 256), "M=4": books(4, 256), "M=1, K=1024": books(1, 1024),
              "M=8, K=64": books(8, 64), "M=8, K=128": books(8, 128)},
    "weights": {"semantic : pixel 1 : 0": quantizer(pixel_weights=(0.0,)), "4 : 1": quantizer(semantic_weights=(4.0,)),
                "1 : 4": quantizer(pixel_weights=(4.0,)), "0 : 1": quantizer(semantic_weights=(0.0,))},
    "table": {
        "ema": quantizer(semantic_table="ema", pixel_table="ema"),
        "simvq": both(quantizer(semantic_table="simvq", pixel_table="simvq", entropy_latents=256), align(entropy=ENTROPY)),
        "text": both(quantizer(semantic_table="text", entropy_latents=256), align(entropy=ENTROPY)),
        "ibq": quantizer(gradient="all"),
        "latent gradient": quantizer(gradient="latent")},
    "lookup-free": {
        "residual": quantizer(kind="residual", dims=48, depth=8),
        "fsq": quantizer(kind="fsq"),
        "lfq": both(quantizer(kind="lfq", bits=(8,) * 8, entropy_latents=256), align(entropy=ENTROPY)),
        "bsq": both(quantizer(kind="bsq", bits=(8,) * 8, entropy_latents=256), align(entropy=ENTROPY))},
    "semantics": {"no distillation": align(semantic=0.0), "contrastive": align(contrastive=0.2),
                  "contrastive, no distillation": align(semantic=0.0, contrastive=0.2)},
    "scales": {"scales 1, 2, 4": lambda t: replace(t, model=replace(t.model, scales=(1, 2, 4)), scale_odds=(0.6, 0.2, 0.2))},
    "perturbation": {"decode stage": decode(0.0), "decode stage, perturbed": decode(0.5)}}
"""By the question they answer."""


# One run ----------------------------------------------------------------------------------------------------------

def run(base: TrainVisual, change: Change, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Train and measure one variant. → its numbers"""
    training = replace(base.training, seed=seed, decode=replace(base.training.decode, steps=0),
                       align=replace(base.training.align, steps=steps, warmup_steps=min(steps // 10, base.training.align.warmup_steps)))
    recipe = replace(base, training=change(replace(training, validate_every=max(1, steps), log_every=max(1, steps // 4), keep_best=False)),
                     out=out)
    if found := violations(recipe.training):
        raise ValueError(f"{out.name}: " + "; ".join(found))
    for folder in (recipe.out, recipe.run):
        shutil.rmtree(folder, ignore_errors=True)
    index = out.with_name("index")  # of the same shards for all runs
    index.mkdir(parents=True, exist_ok=True)
    recipe.run.mkdir()
    (recipe.run / "index").symlink_to(index.resolve())
    began = perf_counter()
    train(recipe)
    seconds, record = perf_counter() - began, json.loads((recipe.run / "metrics.jsonl").read_text().splitlines()[-1])
    q = recipe.training.model.quantizer
    visual, teacher, text = VisualTokenizer.load(out), Teacher.load(recipe.teacher), TextTokenizer.load(base.text)
    return {"M": visual.num_books, "K": visual.codebook_size, "kind": q.kind, "steps": record["step"], "train_seconds": round(seconds, 1),
            "images_per_s": record["images_per_s"], **measure(visual, teacher, text, 1, recipe.training.align.weights.semantic > 0)}


@cache
def held(level: int) -> tuple[list[Scene], Pictures]:
    """Scenes of the split `seen`, which no run trains on, and their pictures [n, H, W, 3]."""
    world = World.at_level(level)
    scenes = [world.scene(2, index, "seen") for index in range(HELD)]
    return scenes, np.stack([render(scene) for scene in scenes])


@torch.no_grad()
def measure(visual: VisualTokenizer, teacher: Teacher, text: TextTokenizer, level: int, distilled: bool) -> dict[str, Any]:
    scenes, pictures = held(level)
    images, world = to_tensor(pictures), World.at_level(level)
    readings = [visual(part) for part in images.split(256)]
    codes, back = torch.cat([r.codes for r in readings]), np.concatenate([to_uint8(r.images) for r in readings])
    semantic = torch.cat([visual.quantizer.parts(r.entries)[0] for r in readings])  # [p, d]
    features = torch.cat([teacher.visual(part)[1] for part in images.split(256)]).flatten(0, 1)  # [p, c]
    said = teacher.text_embedding(teacher.text_batch(text.encode_all([describe(scene) for scene in scenes])))
    use = metrics.code_use(metrics.code_counts(codes, visual.codebook_size))
    out: dict[str, Any] = {
        "psnr": psnr(pictures, back),
        "scene_exact": float(np.mean([scene_matches(s, detect(p, world)) for s, p in zip(scenes[:READ], back[:READ], strict=True)])),
        "cosine": F.cosine_similarity(torch.cat([r.semantic for r in readings]).flatten(0, 1), features, dim=-1).mean().item()
        if distilled else None,
        "explained": explained(semantic, features),
        "caption_recall": caption_recall(semantic.view(HELD, -1, semantic.shape[-1]).mean(1), said),
        "usage": use["usage"], "perplexity_share": use["perplexity"] / visual.codebook_size,
        "least_used_book": min(book["usage"] for book in use["books"]), "positions": use["positions"]}
    originals = embedded(teacher, pictures[:READ])
    out["fd_teacher"] = metrics.frechet_distance(embedded(teacher, back[:READ]), originals)
    near = visual.quantizer.neighbours(max(count for _, count in GRID))
    perturbed = {f"α {alpha:g}, δ {count}": perturb_codes(codes[:READ], near[..., :count], alpha, 1.0, torch.Generator().manual_seed(0))
                 for alpha, count in GRID}
    out["pfd_teacher_grid"] = {name: metrics.frechet_distance(embedded(teacher, to_uint8(visual.decode(some))), originals)
                               for name, some in perturbed.items()}
    out["pfd_teacher"] = float(np.mean(list(out["pfd_teacher_grid"].values())))
    for scale in visual.scales[1:]:
        out[f"psnr_scale_{scale}"] = psnr(pictures, np.concatenate(
            [to_uint8(visual.decode(visual.encode(part, scale), scale)) for part in images.split(256)]))
    return out


def psnr(pictures: Pictures, back: Pictures) -> float:
    return metrics.psnr(metrics.squared_error(*(torch.from_numpy(x).movedim(-1, 1) for x in (pictures, back))).mean().item())


@torch.no_grad()
def embedded(teacher: Teacher, pictures: Pictures) -> Moments:
    """Of the teacher's pooled features of uint8 [n, H, W, 3]. Distances of them need no weights from elsewhere, and are no FID."""
    found = Moments.empty(teacher.config.embed_dim)
    for part in to_tensor(pictures).split(256):
        found.add(teacher.visual(part)[0])
    return found


def ridge(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The linear map x [n, d] → y [n, c], standardised x, in float64 (closed form, penalty 0.001 n)."""
    deviation, mean = torch.std_mean(x.double(), 0)
    normal = (x - mean) / deviation.clamp_min(1e-9)
    gram = normal.T @ normal / len(x)
    gram.diagonal().add_(0.001)
    weight = torch.linalg.solve(gram, normal.T @ (y - y.double().mean(0)) / len(x))
    return lambda z: (z - mean) / deviation.clamp_min(1e-9) @ weight + y.double().mean(0)


def explained(entries: Tensor, features: Tensor) -> float:
    """Share of the variance of the teacher's features [p, c] that a linear map of the semantic entries [p, d] gives; fitted on
    the first half of the pictures, measured on the second. Fair to runs that never saw the teacher."""
    half = len(entries) // 2
    left = (ridge(entries[:half], features[:half])(entries[half:]) - features[half:]).square().sum()
    return (1 - left / (features[half:] - features[half:].mean(0)).square().sum()).item()


def caption_recall(entries: Tensor, said: Tensor) -> float:
    """A picture's mean semantic entry [n, d], mapped linearly (first half) to its caption's embedding [n, c]: how often that caption is
    the nearest of AMONG (second half)."""
    half = len(entries) // 2
    found = F.normalize(ridge(entries[:half], said[:half])(entries[half:]).float(), dim=-1)
    return float(np.mean([recall_at_1(a, b) for a, b in zip(found.split(AMONG), said[half:].split(AMONG), strict=True)]))


# The table --------------------------------------------------------------------------------------------------------

COLUMNS = {"psnr": ("PSNR, dB", "{:.1f}"), "scene_exact": ("scenes exact", "{:.2f}"), "cosine": ("cosine", "{:.3f}"),
           "explained": ("explained", "{:.2f}"), "caption_recall": ("caption of 64", "{:.2f}"), "usage": ("usage", "{:.2f}"),
           "perplexity_share": ("perplexity / K", "{:.2f}"), "fd_teacher": ("FD teacher", "{:.3f}"),
           "pfd_teacher": ("perturbed FD", "{:.3f}"), "train_seconds": ("seconds", "{:.0f}")}


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Markdown: a row for each variant and number of steps (of both stages); mean ± half the range over seeds, of seconds the least."""
    rows: dict[tuple[str, str, int, int, int], list[dict[str, Any]]] = {}
    order = [variant for some in VARIANTS.values() for variant in some]
    for one in sorted(runs, key=lambda one: (-one["asked"], order.index(one["variant"]))):
        rows.setdefault((one["group"], one["variant"], one["steps"], one["M"], one["K"]), []).append(one)
    lines = ["| question | variant | steps | M × K | seeds | " + " | ".join(name for name, _ in COLUMNS.values()) + " |",
             "|---|---|---|---|---|" + "---|" * len(COLUMNS)]
    for (group, variant, steps, count, size), some in rows.items():
        cells = list[str]()
        for key, (_, form) in COLUMNS.items():
            values = [one[key] for one in some if one[key] is not None]
            if not values:
                cells.append("–")
                continue
            if key == "train_seconds":  # the least: other work on the machine only adds
                cells.append(form.format(min(values)))
                continue
            spread = f" ± {form.format((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread)
        lines.append(f"| {group} | {variant} | {steps} | {count} × {size} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def chosen(names: Sequence[str]) -> list[tuple[str, str, Change]]:
    """(group, variant, change) of groups or variants named; all where none is."""
    every = [(group, name, change) for group, some in VARIANTS.items() for name, change in some.items()]
    unknown = [name for name in names if not any(name in (group, variant) for group, variant, _ in every)]
    if unknown:
        raise SystemExit(f"there is no variant {', '.join(unknown)}: choose from {', '.join([*VARIANTS, *(v for _, v, _ in every)])}")
    return [one for one in every if not names or one[0] in names or one[1] in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("raw", type=Path, help="folder of raw shards of level 1, as `mmllm data scenes` writes it")
    parser.add_argument("text", type=Path, help="text.model of their captions")
    parser.add_argument("out", type=Path, help="where runs, runs.json and table.md go")
    parser.add_argument("--recipe", default="tokenizer_tiny", help="the base")
    parser.add_argument("--variants", nargs="*", default=[], help="names, or groups of them; all if not given")
    parser.add_argument("--steps", type=int, default=300, help="of the first stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    base: TrainVisual = replace(recipe_of(arguments.recipe, TrainVisual), raw=arguments.raw, text=arguments.text)
    path = arguments.out / "runs.json"
    done: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    for seed in arguments.seeds:
        for group, variant, change in chosen(arguments.variants):
            if any((one["variant"], one["seed"], one["asked"]) == (variant, seed, arguments.steps) for one in done):
                continue
            name = re.sub(r"[^a-z0-9]+", "-", f"{group} {variant} {arguments.steps} {seed}".lower())
            began = perf_counter()
            numbers = run(base, change, seed, arguments.steps, arguments.out / name)
            done.append({"group": group, "variant": variant, "seed": seed, "asked": arguments.steps, **numbers,
                         "seconds": round(perf_counter() - began, 1)})
            write_json(path, done)
            (arguments.out / "table.md").write_text(table(done))
    print(table(done))


if __name__ == "__main__":
    main()
