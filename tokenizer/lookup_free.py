"""Quantizers without tables: a code is spelled by the signs or the rounded values of its latent.

    FsqQuantizer       every dim rounded to a few values (FSQ, Mentzer et al. 2023, arXiv:2309.15505, section 3.1)
    BinaryQuantizer    every dim is a bit: LFQ (MAGVIT-v2, Yu et al. 2023, arXiv:2310.05737, section 3.1), grouped LFQ (bits of
                       several books), BSQ (bits of a point on the sphere; Zhao et al. 2024, arXiv:2406.07548, section 3.1)

Letters: n positions, M books, K codes of a book, d dims.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.nearest import TINY
from tokenizer.quantize import Quantized, Quantizer, QuantizerConfig


class FsqQuantizer(Quantizer):
    """Dim i takes `levels[i]` values in [-1, 1]; the first dim is the lowest digit of the code."""

    basis: Tensor
    """[d] place value of each dim"""
    levels: Tensor
    """[d]"""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        levels = config.levels
        self.num_books, self.codebook_size, self.dims = 1, math.prod(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))]), persistent=False)
        self.register_buffer("usage", torch.ones(1, self.codebook_size))

    def bound(self, z: Tensor) -> Tensor:
        """Squash to where rounding gives `levels` values: even numbers of them lie off the middle."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (self.levels % 2 == 0) * 0.5
        return (z.float() + (offset / half).atanh()).tanh() * half - offset

    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            return ((self.bound(z).round() + self.levels // 2).long() * self.basis).sum(-1, keepdim=True)

    def decode(self, codes: Tensor) -> Tensor:
        digits = codes // self.basis % self.levels
        return (digits - self.levels // 2) / (self.levels // 2).float()

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            soft, codes = self.bound(z) / (self.levels // 2), self.encode(z)
            if self.training:
                self.count(codes)
            return Quantized(self.decode(codes) + (soft - soft.detach()), codes, {"quantize": torch.zeros((), device=z.device)})


class BinaryQuantizer(Quantizer):
    """Bits are signs. LFQ: entries ±1, the first dim is the lowest bit. BSQ: latents on the unit sphere, entries ±1/√d, the first dim
    is the highest bit.

    The entropy term of a softmax over all 2^bits codes splits into bits for a single latent, exactly. The entropy of the mean
    choice does not; it is computed exactly over groups of at most GROUP bits and added up over groups (BSQ, section 3.2), so
    nothing grows with K. With one bit a group it is the fully analytic form."""

    GROUP = 9
    basis: Tensor
    """[bits] place value of each bit"""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config, self.spherical = config, config.kind == "bsq"
        self.num_books, self.bits = len(config.bits), config.bits[0]
        self.codebook_size, self.dims = 2**self.bits, sum(config.bits)
        powers = torch.arange(self.bits)
        self.register_buffer("basis", 2**(powers.flip(0) if self.spherical else powers), persistent=False)
        self.register_buffer("usage", torch.ones(self.num_books, self.codebook_size))
        self.scale = self.dims**-0.5 if self.spherical else 1.0

    def _point(self, z: Tensor) -> Tensor:
        return F.normalize(z.float(), dim=-1) if self.spherical else z.float()

    def encode(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return ((z.view(len(z), self.num_books, self.bits) > 0) * self.basis).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        bits = (codes[..., None] & self.basis) != 0
        return (bits.float() * 2 - 1).flatten(1) * self.scale

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            point, codes = self._point(z), self.encode(z)
            entries = self.decode(codes)
            losses = {"quantize": self.config.commitment * F.mse_loss(point, entries)}
            if self.training:
                self.count(codes)
                if self.config.entropy_latents:
                    sure, used = self.entropies(point)
                    losses["entropy"] = sure - used
            return Quantized(entries + (point - point.detach()), codes, losses)

    def entropies(self, point: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
        """Of p = softmax(2 · point · entry / temperature) over all codes, in nats: mean entropy of a latent's p, entropy of the mean
        p over groups of bits. point [n, d]"""
        logit = 4 * self.scale * point / self.config.entropy_temperature  # of a bit being 1: its two entries differ by 2 · scale
        p = torch.sigmoid(logit)
        # −p log p − (1−p) log(1−p) without taking logs of zeros
        each = (F.softplus(logit) - p * logit).sum(-1).mean()
        used = torch.zeros((), device=point.device)
        for some in p.split(group, -1):
            # the mean of outer products is one product: [n, 2^⌈g/2⌉], [n, 2^⌊g/2⌋] → [2^⌈g/2⌉, 2^⌊g/2⌋], and no latent's 2^g are built
            high, low = (_joint(half) for half in some.tensor_split([(some.shape[-1] + 1) // 2], -1))
            used = used + torch.special.entr((high.T @ low / len(p)).clamp_min(TINY)).sum()
        return each, used


def _joint(p: Tensor) -> Tensor:
    """Chances [n, bits] that each bit is 1 → [n, 2^bits] of every combination, the first bit the highest."""
    joint = torch.ones(len(p), 1, device=p.device)
    for bit in p.unbind(-1):  # [n, 2^bits so far]
        joint = torch.stack([joint * (1 - bit[:, None]), joint * bit[:, None]], -1).flatten(1)
    return joint
