"""Are drawn pictures like real ones, and like their texts? Fréchet distances and CLIP score, with weights given by path.

A picture is drawn from the text of each pair and kept in OUT/pictures. `fid` has the features of the FID Inception network, `fid_clip:NAME`
those of an open_clip tower, `fd_teacher` those of the visual tokenizer's own (no weights needed; it flatters, see tokenizer.features).
A Fréchet distance of few pictures is biased upwards, and more so of a resample, which has fewer different ones: its interval is therefore
the value ± 1.96 standard errors of the resamples, not their percentiles.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.curate.clip import Clip
from data.images import fit, fitted, load_image, to_array, to_png, to_uint8
from data.tokens import sizes_of
from mmllm.evaluate.bootstrap import Measure, mean, weights
from mmllm.evaluate.items import alike, coded
from mmllm.evaluate.task import DRAWN_BY, Example, Given, Record, Scores, Task, Unit, by_split
from mmllm.generate.sample import Sampling
from tokenizer import features
from tokenizer.features import Extractor
from tokenizer.metrics import Moments, frechet_distance

RESAMPLES = 30
"""Of a Fréchet distance: each is an eigenproblem."""
FEW = 5
"""Pictures for each dim of a feature, below which a distance carries a caution."""
BATCH = 64

Pictures = Sequence[NDArray[np.uint8]]


def units(given: Given) -> list[Unit]:
    return [Unit(item.name, item.split, item) for item in given.items if item.is_pair]


def run(given: Given, some: list[Unit]) -> list[Record]:
    """A picture for each text, on the grid that its own picture has."""
    engine, settings = given.engine, given.settings
    codes = coded(engine, [unit.work.picture for unit in some], [unit.name for unit in some])
    records: dict[int, Record] = {}
    for same in alike(codes, lambda one: one.shape):
        grid = int(codes[same[0]].shape[1]), int(codes[same[0]].shape[2])
        texts = [some[place].work.texts[0] for place in same]
        drawn = engine.draw(texts, guidance=settings.guidance, sampling=Sampling(temperature=settings.temperature), seed=settings.seed,
                            grid=grid)[:, 0]
        for place, text, picture in zip(same, texts, to_uint8(engine.pictures(drawn)), strict=True):
            path = given.file("pictures", some[place].name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(to_png(picture))
            records[place] = {"name": some[place].name, "split": some[place].split, "prompt": text, "file": path.name}
    return [records[place] for place in range(len(some))]


def score(given: Given, records: list[Record]) -> Scores:
    """clip_score: mean over pictures of 100 · max(cos, 0) between picture and text, as torchmetrics defines it (Hessel et al. 2021,
    arXiv:2104.08718, without the factor 2.5), and that of the real pictures; Fréchet distances of all drawn from all real ones."""
    settings, items = given.settings, {item.name: item for item in given.items}
    records = [one for one in records if one["name"] in items]
    drawn = [to_array(load_image(given.out / "pictures" / one["file"])) for one in records]
    real = [to_array(fitted(items[one["name"]].picture, sizes_of(given.engine.visual))) for one in records]
    device = str(given.engine.decoder.device)
    missing: dict[str, str] = {}
    judges: list[tuple[str, Extractor]] = []
    if settings.inception:
        judges.append(("fid", features.inception(settings.inception, device)))
    else:
        missing["fid"] = "no weights given (--inception)"
    measures: dict[str, Measure] = {}
    if settings.clip_name and settings.clip_weights:
        judge = features.clip(settings.clip_name, settings.clip_weights, device)
        judges.append((judge.distance, judge))
        clip = Clip.load(f"open_clip:{settings.clip_name}:{settings.clip_weights}", torch.device(device))
        found = {what: clip_scores(clip, pictures, [one["prompt"] for one in records]) for what, pictures in
                 (("clip_score", drawn), ("clip_score of real pictures", real))}
        for split, some in by_split(records).items():
            own = [place for place, one in enumerate(records) if one["split"] == split]
            measures |= {f"{split}/{what}": mean([one["name"] for one in some], values[own]) for what, values in found.items()}
    else:
        missing["clip_score, fid_clip"] = "no weights given (--clip-name, --clip-weights)"
    visual = given.engine.visual
    judges.append(("fd_teacher", features.teacher(visual.features)))
    ready: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for name, judge in judges:
        where = str(next(visual.parameters()).device) if name == "fd_teacher" else device
        ours, theirs = embedded(judge, drawn, where), embedded(judge, real, where)
        ready[f"all/{name}"] = distance(ours, theirs, settings.seed)
        if len(records) < FEW * ours.shape[1]:
            notes.append(f"{name} of {len(records):,} pictures and {ours.shape[1]:,} features is biased upwards: compare with sets of this "
                         "size alone.")
    return Scores(measures=measures, ready=ready, notes=notes, missing=missing)


def clip_scores(clip: Clip, pictures: Pictures, texts: Sequence[str]) -> NDArray[np.float64]:
    """→ [b]"""
    fitting = [to_array(fit(Image.fromarray(picture), clip.image_size)) for picture in pictures]
    cosines = (clip.embed_pictures(fitting, BATCH) * clip.embed_texts(texts, BATCH)).sum(-1)
    return 100 * cosines.clamp_min(0).double().numpy()


def embedded(judge: Extractor, pictures: Pictures, device: str) -> Tensor:
    """→ features [n, d] float64, in order, on the CPU."""
    out: dict[int, Tensor] = {}
    for same in alike(pictures, lambda picture: picture.shape):
        for first in range(0, len(same), BATCH):
            places = same[first:first + BATCH]
            batch = torch.from_numpy(np.stack([pictures[place] for place in places])).movedim(-1, 1).contiguous()
            out.update(zip(places, judge.embed(batch.to(device)).double().cpu(), strict=True))
    return torch.stack([out[place] for place in range(len(pictures))])


def distance(drawn: Tensor, real: Tensor, seed: int) -> dict[str, Any]:
    """Fréchet distance of features [n, d] with its interval; pairs of a drawn and a real picture are resampled together."""
    n, width = drawn.shape

    def of(weight: Tensor) -> float:
        sides = [Moments.empty(width), Moments.empty(width)]
        for side, values in zip(sides, (drawn, real), strict=True):
            side.count.add_(weight.sum())
            side.total.add_(weight @ values)
            side.gram.add_((values * weight[:, None]).T @ values)
        return frechet_distance(*sides)

    value = of(torch.ones(n, dtype=torch.float64))
    error = float(np.std([of(torch.from_numpy(w)) for some in weights(n, RESAMPLES, seed) for w in some]))
    return {"value": value, "low": max(0.0, value - 1.96 * error), "high": value + 1.96 * error, "error": error, "units": n, "better": -1}


def show(given: Given, record: Record) -> Example:
    """The drawn picture, and the real one."""
    drawn = base64.b64encode((given.out / "pictures" / record["file"]).read_bytes()).decode()
    return Example([drawn, given.picture(record["name"])], [(record["prompt"], None)])


PICTURES = Task(units=units, run=run, score=score, show=show, decided_by=DRAWN_BY,
                lacking="the shards hold no picture with one text (SHARDS, --prefix)")
