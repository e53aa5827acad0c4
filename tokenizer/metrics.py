"""Measures of a visual tokenizer. Each is defined once, in its docstring, exactly enough to be written again from it.

Common to all: original and reconstruction are uint8 RGB of one size. The original is fitted once; the reconstruction is clipped to
[-1, 1] and rounded, (x + 1) · 127.5 half to even; neither passes through a file. A number of the same name made otherwise (SSIM with
twice the range, FID of JPEG files, another crop) is another measure, and not comparable.

Letters: b pictures, H W pixels, n samples, d dims of a feature, M books, K entries, h w code grid, C classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CAP = 100.0
"""dB of a picture that comes back exactly."""
WINDOW = 11
"""px: side of SSIM's window"""
MS_SSIM_SIDE = 16 * WINDOW
MS_SSIM_POWERS = 0.0448, 0.2856, 0.3001, 0.2363, 0.1333


def full_precision() -> AbstractContextManager[None]:
    """Convolutions in fp32 on a GPU, not in TF32's 10 bits of mantissa, which cudnn takes unasked."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


# Pixels -----------------------------------------------------------------------------------------------------------


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """uint8 [b, 3, H, W] twice → [b] float64: mean of (a − b)² over the 3 · H · W values of each picture, exact."""
    return (a.int() - b.int()).square().flatten(1).sum(1).double() / a[0].numel()


def psnr(error: float) -> float:
    """10 · log10(255² / error) dB of uint8 pictures with mean squared error `error`, at most 100 dB.

    `psnr` of a set is that of the mean error over all pixels of all pictures. `psnr_mean` is the mean over pictures of each one's;
    never less, and what most papers print."""
    return min(PSNR_CAP, 10 * math.log10(255**2 / error)) if error > 0 else PSNR_CAP


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, doi:10.1109/TIP.2003.819861, equation 13) of uint8 [b, 3, H, W] twice → [b].

    float64 on values 0 … 255, so the range L is 255; K1 = 0.01, K2 = 0.03; Gaussian window of 11 × 11, σ = 1.5, moments weighted by it
    without Bessel's correction; borders reflected; mean over all H · W positions of the three channels. `ssim` of a set is the
    mean over pictures. Sides below 6 px cannot be reflected and are refused."""
    return torch.cat([_similarity(x, y)[0].mean((1, 2, 3)) for x, y in _pieces(a, b)])


def ms_ssim(a: Tensor, b: Tensor) -> Tensor | None:
    """Multi-scale structural similarity (Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216, equation 7) of uint8 [b, 3, H, W] twice → [b].

    Five scales, 2 × 2 means between them. At the first four the contrast–structure term of `ssim`, mean over the positions whose window
    needs no reflection; at the last `ssim` itself over all; negative means are 0; product of the powers .0448 .2856 .3001 .2363 .1333.
    None where a side is below 176 px: four halvings then leave less than the window's 11."""
    return None if min(a.shape[-2:]) < MS_SSIM_SIDE else torch.cat([_multiscale(x, y) for x, y in _pieces(a, b)])


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some pictures at once, float64: 8 MiB a map, of which a dozen exist."""
    if min(a.shape[-2:]) <= WINDOW // 2:
        raise ValueError(f"SSIM of {a.shape[-2]}x{a.shape[-1]} px: its window needs sides of {WINDOW // 2 + 1} px; take larger pictures")
    some = max(1, 2**20 // a[0].numel())
    for x, y in zip(a.split(some), b.split(some), strict=True):
        yield x.double(), y.double()


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """→ maps of similarity and of its contrast–structure term, [b, 3, H, W]. Variances are differences of squares up to 65,025 beside
    a constant of 58.5: in fp32 a flat picture's SSIM is off by up to 7e-4."""
    down, across = (_blur(side, x.device) for side in x.shape[-2:])
    mx, my, xx, yy, xy = (down @ values @ across.T for values in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255)**2, (0.03 * 255)**2
    contrast = (2 * (xy - mx * my) + c2) / ((xx - mx * mx).clamp_min(0) + (yy - my * my).clamp_min(0) + c2)
    return (2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast, contrast


def _multiscale(x: Tensor, y: Tensor) -> Tensor:
    out, half = torch.ones(len(x), dtype=x.dtype, device=x.device), WINDOW // 2
    for scale, power in enumerate(MS_SSIM_POWERS):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        whole, contrast = _similarity(x, y)
        term = whole if scale == len(MS_SSIM_POWERS) - 1 else contrast[..., half:-half, half:-half]
        out = out * term.mean((1, 2, 3)).clamp_min(0)**power
    return out


def _blur(side: int, device: torch.device) -> Tensor:
    """[side, side] that weighs a column by the window, its ends reflected. As products of matrices the window costs less
    than a tenth of an 11 × 11 convolution in float64."""
    taps = torch.arange(WINDOW, dtype=torch.float64, device=device) - WINDOW // 2
    weights = torch.exp(-taps.square() / (2 * 1.5**2))
    unit = F.pad(torch.eye(side, dtype=torch.float64, device=device)[None], (WINDOW // 2, WINDOW // 2), mode="reflect")[0]
    return (unit.unfold(1, WINDOW, 1) @ (weights / weights.sum())).T


# Distributions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Count, sum and Gram matrix of features in float64, filled in place: what a Gaussian fit needs, whatever the number of samples."""

    count: Tensor
    """scalar"""
    total: Tensor
    """[d]"""
    gram: Tensor
    """[d, d] Σ x xᵀ"""

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        shapes = (), (width,), (width, width)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, features: Tensor) -> None:
        """features [n, d]"""
        x = features.double()
        self.count.add_(len(x))
        self.total.add_(x.sum(0))
        self.gram.addmm_(x.T, x)

    def merge(self, other: "Moments") -> None:
        for mine, theirs in zip(self.parts(), other.parts(), strict=True):
            mine.add_(theirs.to(mine.device))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count, self.total, self.gram

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """→ mean [d], covariance [d, d] with divisor n − 1."""
        n = self.count.item()
        if n < 2:
            raise ValueError(f"a covariance of {n:.0f} pictures does not exist: give two or more")
        mean = self.total / n
        return mean, (self.gram - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μa − μb|² + tr Σa + tr Σb − 2 tr (Σa Σb)^½ of Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv:1706.08500,
    equation 6); float64, covariances with divisor n − 1.

    The last trace is the sum of the singular values of Σa^½ Σb^½, roots by eigenvalues with negative ones taken for 0: real, the
    same both ways round, and without the ridge that a general matrix root needs where n ≤ d. Biased upwards by
    about d / n: sets of equal size alone compare. With Inception features it is `rfid`; with others it has another name."""
    (mean_a, cov_a), (mean_b, cov_b) = a.gaussian(), b.gaussian()
    mixed = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed).item())


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root, [d, d]."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


# Codes ------------------------------------------------------------------------------------------------------------


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each entry is chosen: codes [b, M, h, w] → int64 [M, K]. Counts of batches add up; those of ranks by one
    `tokenizer.ranks.sum_over_ranks`."""
    books = codes.shape[1]
    index = codes.long() + codebook_size * torch.arange(books, device=codes.device).view(1, -1, 1, 1)
    return torch.bincount(index.flatten(), minlength=books * codebook_size).view(books, codebook_size)


def code_use(counts: Tensor) -> dict[str, Any]:
    """counts [M, K] over the whole set → usage and perplexity of each book, and their means over books.

    Usage: share of the K entries chosen at least once. Perplexity: exp of the entropy, in nats, of how the choices fall on the entries;
    K where all are equally frequent. Both grow with the number of codes counted, `positions`: compare sets of one size."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    usage, perplexity = (counts > 0).double().mean(-1), torch.special.entr(share).sum(-1).exp()
    return {"usage": usage.mean().item(), "perplexity": perplexity.mean().item(), "positions": int(counts[0].sum()),
            "books": [{"usage": u, "perplexity": p} for u, p in zip(usage.tolist(), perplexity.tolist(), strict=True)]}


class Agreement(NamedTuple):
    books: Tensor
    """[b, M] share of positions whose code in that book is the same"""
    whole: Tensor
    """[b] share of positions where all M codes are"""


def agreement(fine: Tensor, coarse: Tensor) -> Agreement:
    """Codes [b, M, h, w] and [b, M, h / s, w / s] of the same pictures: share of the h · w positions with equal codes, the coarse code
    standing for the s × s positions that it covers. s = 1 compares grids of one size, such as encode(x) and
    encode(decode(encode(x))), the reconstruction rounded to uint8 between: `reencode`."""
    down, across = fine.shape[-2] // coarse.shape[-2], fine.shape[-1] // coarse.shape[-1]
    same = fine == coarse.repeat_interleave(down, -2).repeat_interleave(across, -1)
    return Agreement(same.double().mean((-2, -1)), same.all(1).double().mean((-2, -1)))


def chance_agreement(a: Tensor, b: Tensor) -> list[float]:
    """Of each book, what `agreement` would be were positions drawn independently: Σk pa(k) pb(k). counts [M, K] twice."""
    shares = [counts.double() / counts.sum(-1, keepdim=True).clamp_min(1) for counts in (a, b)]
    return (shares[0] * shares[1]).sum(-1).tolist()


# Meaning ----------------------------------------------------------------------------------------------------------


def zero_shot(images: Tensor, classes: Tensor, labels: Sequence[int]) -> float:
    """Top-1 accuracy of the class with the largest cosine: picture features [n, d], text features [C, d] (one prompt a class,
    "a photo of a NAME."), labels n. Measured on originals and on reconstructions, by the same tower."""
    chosen = (F.normalize(images.double(), dim=-1) @ F.normalize(classes.double(), dim=-1).T).argmax(-1)
    return (chosen.cpu() == torch.tensor(labels)).double().mean().item()


PROBE_EVERY = 5


def linear_probe(features: Tensor, labels: Sequence[int]) -> float:
    """Top-1 accuracy of a linear classifier on frozen features [n, d]; every fifth picture in source order tests, the rest train.

    Ridge regression on one-hot labels in float64: features standardised by the training part's mean and deviation, targets
    centred, W = (XᵀX / n + 0.01 I)⁻¹ XᵀY / n, the largest output is the class. Closed form: no seed, no steps."""
    x, y = features.double(), torch.tensor(labels, device=features.device)
    tests = torch.arange(len(x), device=x.device) % PROBE_EVERY == PROBE_EVERY - 1
    targets = F.one_hot(y[~tests]).double()
    if not tests.any() or len(targets) < 2:
        raise ValueError(f"a linear probe on {len(x)} pictures has nothing to test on: give {PROBE_EVERY} or more with labels")
    deviation, mean = torch.std_mean(x[~tests], 0)
    train, test = ((part - mean) / deviation.clamp_min(1e-9) for part in (x[~tests], x[tests]))
    gram = train.T @ train / len(train)
    gram.diagonal().add_(0.01)
    prior = targets.mean(0)
    weight = torch.linalg.solve(gram, train.T @ (targets - prior) / len(train))
    return ((test @ weight + prior).argmax(-1) == y[tests]).double().mean().item()
