"""Shared-index dual product quantizer: one code looks up a semantic and a pixel entry.

Book m has a semantic table Es_m and a pixel table Ep_m with one index for both:

    z = [√a · l2(zs), √b · zp]      E = [√a · l2(Es), √b · Ep]      i = argmax_k z · E_k − |E_k|² / 2

which is the nearest entry, found by one chunked matrix product. The shared mapping is TokenFlow's (Qu et al. 2024,
arXiv:2412.03069, section 3.1), the books are UniTok's (Ma et al. 2025, arXiv:2502.20321, section 3.2).

The semantic table is *text-aligned*: Es = E_text · W, rows of a frozen text-embedding matrix under a trained projection
(TA-Tok, Han et al. 2025, arXiv:2506.18898, section 3.1). There a code needs a row of its own, so K may not exceed the usable
rows. Here the pixel entry tells codes apart, so rows may repeat: a code is a short phrase and a look, and its
semantic row is the mean of the phrase's token embeddings.

Letters: n positions, M books, K entries a book, ds dp_m dims of book m's semantic and pixel part, V D rows and width of the
text embedding, p tokens in a phrase.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 16_384
"""Positions whose scores against all entries exist at once: 16,384 × 4,096 fp32 is 256 MiB."""


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Sizes and weights of the quantizer."""

    codebook_size: int = 128
    """K: entries of each book."""
    pixel_dims: tuple[int, ...] = (6, 64)
    """dp of each book; as many books as numbers."""
    semantic_dim: int = 16
    """ds: semantic dims of a book."""
    semantic_weight: float = 0.003
    """a: weight of the semantic part in the choice of a code."""
    pixel_weight: float = 1.0
    """b: weight of the pixel part."""
    phrase_len: int = 2
    """p: text tokens whose mean is a code's semantic row."""
    commitment: float = 0.25
    """Weight of the encoder's pull towards the entries (van den Oord et al. 2017, arXiv:1711.00937, equation 3)."""

    @property
    def num_books(self) -> int:
        """M: codes at each position."""
        return len(self.pixel_dims)


class Quantized(NamedTuple):
    semantic: Tensor
    """[n, M · ds] unit length per book; gradients reach both the entries and what they stand for"""
    pixel: Tensor
    """[n, dp_0 + … ] likewise"""
    codes: Tensor
    """[n, M] int64"""
    loss: Tensor
    """scalar: codebook + commitment"""


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Index of the nearest entry: z [n, d], entries [K, d] → [n]; fp32, whatever autocast says."""
    with torch.autocast(z.device.type, enabled=False):
        entries = entries.float()
        half = entries.square().sum(-1) / 2
        return torch.cat([torch.addmm(-half, part.float(), entries.T).argmax(-1) for part in z.split(CHUNK)])


class SharedIndexQuantizer(nn.Module):
    """M books of K shared-index entries. Tables are filled by `start`; until then they are random."""

    text: Tensor
    """[V, D] frozen text embedding, centred, rows of unit length on average"""
    pieces: Tensor
    """[V] int64 which rows of the text model's embedding those are"""
    phrases: Tensor
    """[M, K, p] int64 rows of `text` that make each code's semantic entry"""
    usage: Tensor
    """[M, K] moving average of how often a code is chosen, as a share of positions × K"""

    def __init__(self, config: QuantizerConfig, text: Tensor, pieces: Tensor) -> None:
        """text [V, D], pieces [V]: the rows of a text-embedding matrix that codes may be made of, and their ids."""
        super().__init__()
        self.config = c = config
        self.register_buffer("text", text.float())
        self.register_buffer("pieces", pieces)
        self.register_buffer("phrases", torch.randint(len(text), (c.num_books, c.codebook_size, c.phrase_len)))
        self.register_buffer("usage", torch.ones(c.num_books, c.codebook_size))
        self.projection = nn.Parameter(torch.empty(c.num_books, text.shape[1], c.semantic_dim))  # W
        nn.init.orthogonal_(self.projection)
        self.pixel_tables = nn.ParameterList(torch.randn(c.codebook_size, dims) / dims**0.5 for dims in c.pixel_dims)

    def semantic_table(self, book: int) -> Tensor:
        """→ [K, ds], rows of unit length."""
        return F.normalize(self.text[self.phrases[book]].mean(1) @ self.projection[book], dim=-1)

    def joint(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """[…, ds] (unit), […, dp] → […, ds + dp], in which distance decides."""
        return torch.cat([self.config.semantic_weight**0.5 * semantic, self.config.pixel_weight**0.5 * pixel], -1)

    def split(self, semantic: Tensor, pixel: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[n, M · ds], [n, Σ dp] → the parts of each book, the semantic one of unit length."""
        c = self.config
        return [(F.normalize(s.float(), dim=-1), p.float()) for s, p in
                zip(semantic.split(c.semantic_dim, -1), pixel.split(c.pixel_dims, -1), strict=True)]

    @torch.no_grad()
    def encode(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """[n, M · ds], [n, Σ dp] → codes [n, M]."""
        return torch.stack([nearest(self.joint(s, p), self.joint(self.semantic_table(m), self.pixel_tables[m]))
                            for m, (s, p) in enumerate(self.split(semantic, pixel))], -1)

    def decode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes [n, M] → semantic [n, M · ds], pixel [n, Σ dp]."""
        books = range(self.config.num_books)
        return (torch.cat([self.semantic_table(m)[codes[:, m]] for m in books], -1),
                torch.cat([F.embedding(codes[:, m], self.pixel_tables[m]) for m in books], -1))

    def forward(self, semantic: Tensor, pixel: Tensor) -> Quantized:
        with torch.autocast(semantic.device.type, enabled=False):
            codes = self.encode(semantic, pixel)
            parts = self.split(semantic, pixel)
            zs, zp = torch.cat([s for s, _ in parts], -1), torch.cat([p for _, p in parts], -1)
            qs, qp = self.decode(codes)
            z, q = self.joint(zs, zp), self.joint(qs, qp)
            loss = F.mse_loss(q, z.detach()) + self.config.commitment * F.mse_loss(z, q.detach())
            if self.training:
                self.count(codes)
            return Quantized(qs + zs - zs.detach(), qp + zp - zp.detach(), codes, loss)

    def words(self, book: int) -> Tensor:
        """[K, p] text ids that name each code."""
        return self.pieces[self.phrases[book]]

    # Keeping every code alive ---------------------------------------------------------------------------------

    @torch.no_grad()
    def count(self, codes: Tensor, momentum: float = 0.98) -> None:
        size = self.config.codebook_size
        for m in range(self.config.num_books):
            share = torch.bincount(codes[:, m], minlength=size).float() * (size / len(codes))
            self.usage[m].lerp_(share, 1 - momentum)

    @torch.no_grad()
    def revive(self, pixel: Tensor, below: float = 0.03, seed: int = 0) -> int:
        """Move codes used less than `below` of their fair share onto random latents [n, Σ dp]; each takes the phrase of the
        nearest living code. → how many."""
        generator = torch.Generator().manual_seed(seed)
        revived = 0
        for m, p in enumerate(pixel.float().split(self.config.pixel_dims, -1)):
            dead = (self.usage[m] < below).nonzero().squeeze(-1)
            dead = dead[torch.randperm(len(dead), generator=generator)[:len(p)]]
            picks = torch.randperm(len(p), generator=generator)[:len(dead)]
            alive = (self.usage[m] >= below).nonzero().squeeze(-1)
            like = alive[nearest(p[picks], self.pixel_tables[m][alive])]
            self.pixel_tables[m][dead] = p[picks]
            self.phrases[m, dead] = self.phrases[m, like]
            self.usage[m, dead] = 1.0
            revived += len(dead)
        return revived

    # Start ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, book: int, entries: Tensor, phrases: Tensor, target: Tensor) -> None:
        """Fill a book: pixel entries [K, dp], phrases [K, p], and the projection fitted by ridge regression so that each
        phrase's row points at target [K, ds], the mean semantic latent of what the code stands for."""
        self.pixel_tables[book].copy_(entries)
        self.phrases[book] = phrases
        rows = self.text[phrases].mean(1)  # [K, D]
        gram = (rows.T @ rows).double()
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        self.projection[book] = torch.linalg.solve(gram, (rows.T @ target).double()).float()


@torch.no_grad()
def kmeans(x: Tensor, weight: Tensor, count: int, rounds: int, seed: int) -> Tensor:
    """Weighted k-means: x [n, d], weight [n] → centres [count, d]. Started by k-means++ (Arthur and Vassilvitskii 2007, section 2.2),
    so far-apart points get a centre each before any crowd gets two; empty clusters move to the worst-served points."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.empty(count, x.shape[1], device=x.device)
    distance = torch.ones(len(x), device=x.device)
    for number in range(count):
        chance = (distance * weight).double().cpu()
        if chance.sum() <= 0:  # fewer distinct points than codes: the others wait beside points that exist, to be revived
            spare = torch.randint(len(x), (count - number,), generator=generator).to(x.device)
            noise = torch.randn(len(spare), x.shape[1], generator=generator).to(x)
            centres[number:] = x[spare] + 0.5 * noise * x.std()
            return centres
        centres[number] = x[int(torch.multinomial(chance, 1, generator=generator))]
        away = (x - centres[number]).square().sum(-1)
        distance = away if number == 0 else torch.minimum(distance, away)
    for _ in range(rounds):
        index = nearest(x, centres)
        total = torch.zeros_like(centres).index_add_(0, index, x * weight[:, None])
        mass = torch.zeros(count, device=x.device).index_add_(0, index, weight)
        error = (x - centres[index]).square().sum(-1) * weight
        empty = (mass == 0).nonzero().squeeze(-1)
        centres = torch.where(mass[:, None] > 0, total / mass.clamp_min(1e-12)[:, None], centres)
        if len(empty):
            worst = error.topk(min(len(empty), len(x))).indices
            centres[empty[:len(worst)]] = x[worst]
    return centres
