"""What stays of the pictures that a visual tokenizer is measured on, and the scores made of it.

Pictures go by in batches. Of each only its own numbers stay, of features their moments, of codes their counts; so a set of any size
fits, and nothing depends on the batch. Definitions are those of `tokenizer.metrics`.

Letters: b pictures, H W pixels, M books, K entries, δ neighbours, h w code grid.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images import to_tensor, to_uint8
from tokenizer import metrics
from tokenizer.features import Extractor
from tokenizer.metrics import Moments
from tokenizer.model import VisualTokenizer
from tokenizer.perceptual import Perceptual
from tokenizer.perturb import perturb_codes

GRID = ((0.1, 10), (0.1, 100), (0.5, 10), (0.5, 100))
"""(α, δ) of the perturbed distances."""
SHOWN, GROUNDS, PERTURBED = 8, 8, 4
"""Pictures kept: worst and best each, grounds for text, perturbed ones."""
FEW = 5
"""Pictures for each dim of a feature, below which a Fréchet distance carries a caution."""

Pictures = NDArray[np.uint8]
"""[b, H, W, 3] or one [H, W, 3]"""


class Sample(NamedTuple):
    name: str
    picture: Pictures
    label: str | None


class Shown(NamedTuple):
    psnr: float
    name: str
    original: Pictures
    rebuilt: Pictures


def channels_first(pictures: Pictures, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [b, H, W, 3] → [b, 3, H, W]"""
    return torch.from_numpy(np.ascontiguousarray(pictures)).movedim(-1, -3).contiguous().to(device)


def scales_of(visual: VisualTokenizer) -> tuple[int, ...]:
    """Finest first."""
    return tuple(sorted(visual.scales))


def encode(visual: VisualTokenizer, pictures: Pictures, scale: int, device: str) -> Tensor:
    """uint8 [b, H, W, 3] → codes [b, M, h, w]"""
    return visual.encode(to_tensor(pictures).to(device), scale)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """A tokenizer, what judges it, and what they have said so far."""

    visual: VisualTokenizer
    judges: Sequence[Extractor]
    perceptual: Perceptual | None
    seed: int
    device: str
    values: dict[tuple[int, str], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """By scale and measure: [b] or [b, M], batch behind batch."""
    counts: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """By scale: [M, K]"""
    moments: dict[str, dict[str, Moments]] = field(default_factory=lambda: defaultdict(dict))
    """By judge and what it saw: "original", a scale, or an (α, δ)."""
    embedded: dict[str, dict[str, list[Tensor]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    """Features of the pictures with a label, by judge and side."""
    labels: list[str] = field(default_factory=list[str])
    shown: list[Shown] = field(default_factory=list[Shown])
    """The worst and the best, by PSNR."""
    grounds: list[Pictures] = field(default_factory=list[Pictures])
    perturbed: list[dict[str, Pictures]] = field(default_factory=list[dict[str, Pictures]])
    """The first pictures: original, reconstruction, and what each (α, δ) makes of them."""

    @property
    def finest(self) -> int:
        return scales_of(self.visual)[0]

    @property
    def count(self) -> int:
        """Pictures so far."""
        return sum(map(len, self.values[self.finest, "error"]))

    @torch.no_grad()
    def add(self, batch: Sequence[Sample], neighbours: Tensor) -> None:
        """Code, decode, compare and count. neighbours [M, K, δ] of each entry, nearest first."""
        originals, number = np.stack([sample.picture for sample in batch]), self.count
        codes = {scale: encode(self.visual, originals, scale, self.device) for scale in scales_of(self.visual)}
        rebuilt = {scale: to_uint8(self.visual.decode(some, scale)) for scale, some in codes.items()}
        for scale in codes:
            self._compare(originals, rebuilt[scale], codes, scale)
        near = dict.fromkeys((alpha, min(delta, neighbours.shape[-1])) for alpha, delta in GRID)
        perturbed = {f"α {a:g}, δ {d}": self.perturb(codes[self.finest], neighbours[..., :d], a, number) for a, d in near}
        moved = {name: to_uint8(self.visual.decode(some, self.finest)) for name, some in perturbed.items()}
        labelled = [at for at, sample in enumerate(batch) if sample.label is not None]
        sides = {"original": originals, **{str(scale): pictures for scale, pictures in rebuilt.items()}, **moved}
        for judge in self.judges:
            for side, pictures in sides.items():
                found = judge.embed(channels_first(pictures, self.device))
                self.moments[judge.name].setdefault(side, Moments.empty(found.shape[1], found.device)).add(found)
                if labelled and side in ("original", str(self.finest)):
                    self.embedded[judge.name][side].append(found[labelled].cpu())
        self.labels.extend(sample.label for sample in batch if sample.label is not None)
        self._keep(batch, originals, rebuilt[self.finest], moved)

    def _compare(self, originals: Pictures, rebuilt: Pictures, codes: dict[int, Tensor], scale: int) -> None:
        a, b = channels_first(originals, self.device), channels_first(rebuilt, self.device)
        found: dict[str, Tensor | None] = {
            "error": metrics.squared_error(a, b), "ssim": metrics.ssim(a, b), "ms_ssim": metrics.ms_ssim(a, b)}
        if self.perceptual is not None:
            with metrics.full_precision():
                found[f"lpips_{self.perceptual.backbone}"] = self.perceptual(a / 127.5 - 1, b / 127.5 - 1)
        again = encode(self.visual, rebuilt, scale, self.device)
        found["reencode_books"], found["reencode"] = metrics.agreement(codes[scale], again)
        if scale != self.finest:
            found["as_finest_books"], found["as_finest"] = metrics.agreement(codes[self.finest], codes[scale])
        for name, value in found.items():
            if value is not None:
                self.values[scale, name].append(value.double().cpu())
        counts = metrics.code_counts(codes[scale], self.visual.codebook_size)
        self.counts[scale] = self.counts[scale] + counts if scale in self.counts else counts

    def perturb(self, codes: Tensor, near: Tensor, alpha: float, first: int) -> Tensor:
        """Fréchet distance of originals from what perturbed codes decode to (pFID, Qiu et al. 2025, arXiv:2503.08354): each code of
        the finest scale is replaced with chance α by one of the δ entries nearest to its own, in every picture (β = 1).

        The mean over (α, δ) of (0.1, 10), (0.1, 100), (0.5, 10), (0.5, 100), δ at most K − 1; others average over other pairs, so it
        compares with nothing published. A picture draws by seed · 2³² + its number in the set, the same for every pair."""
        own = [torch.Generator().manual_seed((self.seed << 32) + first + at) for at in range(len(codes))]
        return perturb_codes(codes, near, alpha, 1.0, own)

    def _keep(self, batch: Sequence[Sample], originals: Pictures, rebuilt: Pictures, moved: dict[str, Pictures]) -> None:
        errors = self.values[self.finest, "error"][-1].tolist()
        known = [*self.shown, *(Shown(metrics.psnr(error), sample.name, sample.picture, back)
                                for error, sample, back in zip(errors, batch, rebuilt, strict=True))]
        known.sort(key=lambda one: (one.psnr, one.name))
        self.shown[:] = known if len(known) <= 2 * SHOWN else known[:SHOWN] + known[-SHOWN:]
        self.grounds.extend(originals[:GROUNDS - len(self.grounds)])
        rows = {"original": originals, "reconstruction": rebuilt, **moved}
        self.perturbed.extend({name: pictures[at] for name, pictures in rows.items()}
                              for at in range(min(PERTURBED - len(self.perturbed), len(batch))))

    # Scores -----------------------------------------------------------------------------------------------------------

    def scores(self) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """→ scores, what was not measured and why, cautions."""
        scales, side = scales_of(self.visual), self.visual.image_size
        scores = self._of_scale(self.finest)
        if len(scales) > 1:
            scores["scales"] = {str(scale): self._of_scale(scale) for scale in scales}
        missing, notes = dict[str, str](), list[str]()
        if (self.finest, "ms_ssim") not in self.values:
            missing["ms_ssim"] = f"pictures of {side} px; its five scales need {metrics.MS_SSIM_SIDE} px"
        if self.perceptual is None:
            missing["lpips"] = "no weights given (--lpips)"
        for kind, distances, knobs in (("inception", ("rfid", "pfid"), "--inception"),
                                       ("clip:", ("fid_clip", "pfid_clip"), "--clip-name, --clip-weights")):
            if not any(judge.name.startswith(kind) for judge in self.judges):
                missing |= dict.fromkeys(distances, f"no weights given ({knobs})")
        scores["perturbed"] = {}
        for judge in self.judges:
            seen = self.moments[judge.name]
            grid = {name: metrics.frechet_distance(moments, seen["original"]) for name, moments in seen.items() if name.startswith("α")}
            scores[judge.perturbed], scores["perturbed"][judge.perturbed] = float(np.mean(list(grid.values()))), grid
            if self.count < FEW * (width := len(seen["original"].total)):
                notes.append(f"{judge.distance} and {judge.perturbed} of {self.count:,} pictures and {width:,} features are biased "
                             "upwards: compare with sets of this size alone")
        self._of_classes(scores, missing)
        return scores, missing, notes

    def _of_scale(self, scale: int) -> dict[str, Any]:
        known = {name: torch.cat(parts) for (of, name), parts in self.values.items() if of == scale}
        error = known.pop("error")
        out: dict[str, Any] = {"psnr": metrics.psnr(error.mean().item()), "psnr_mean": float(np.mean([*map(metrics.psnr, error.tolist())]))}
        out |= {name: value.mean(0).tolist() for name, value in known.items()}
        for judge in self.judges:
            seen = self.moments[judge.name]
            out[judge.distance] = metrics.frechet_distance(seen[str(scale)], seen["original"])
        use = metrics.code_use(self.counts[scale])
        codes = use["positions"] / self.count * self.visual.num_books
        entropy = float(np.mean([math.log2(book["perplexity"]) for book in use["books"]]))
        out |= use | {"codes_a_picture": codes, "bits_a_picture": codes * math.log2(self.visual.codebook_size),
                      "entropy_bits_a_picture": codes * entropy}
        if scale != self.finest:
            out["as_finest_by_chance"] = metrics.chance_agreement(self.counts[self.finest], self.counts[scale])
        return out

    def _of_classes(self, scores: dict[str, Any], missing: dict[str, str]) -> None:
        """Zero-shot accuracy and linear probes, of originals and of reconstructions."""
        classes = {name: number for number, name in enumerate(sorted(Counter(self.labels)))}
        labels = [classes[label] for label in self.labels]
        if len(classes) < 2 or len(labels) < metrics.PROBE_EVERY:
            why = f"{len(labels)} pictures with a label, of {len(classes)} classes (sub-folders, KEY.cls, --label)"
            missing |= {"linear_probe": why, "zero_shot": why}
            return
        scores["classes"], scores["labelled"], scores["linear_probe"], scores["zero_shot"] = len(classes), len(labels), {}, {}
        for judge in self.judges:
            known = {"original": torch.cat(self.embedded[judge.name]["original"]),
                     "reconstruction": torch.cat(self.embedded[judge.name][str(self.finest)])}
            scores["linear_probe"][judge.name] = {side: metrics.linear_probe(found, labels) for side, found in known.items()}
            if judge.embed_classes is not None and not all(name.isdecimal() for name in classes):
                words = judge.embed_classes([name.replace("_", " ") for name in classes]).cpu()
                scores["zero_shot"][judge.name] = {side: metrics.zero_shot(found, words, labels) for side, found in known.items()}
        if not scores["zero_shot"]:
            del scores["zero_shot"]
            unread = [judge.unread for judge in self.judges if judge.unread]
            numbers = "classes are numbers, not names" if all(name.isdecimal() for name in classes) else ""
            missing["zero_shot"] = numbers or (unread or ["no tower that reads class names (--clip-name, --clip-weights)"])[0]
