"""Scores of latents against entries, a tile at a time: no tensor of all latents × all entries is ever built.

The nearest entry is the best of the bests of blocks of entries, so its tiles can be as square as the cache likes; a softmax needs all
entries at once, so its tiles are whole rows of few latents.

Codes depend on the last bits of a score where two entries lie close, so all of this is fp32 whatever autocast says.

Letters: n latents, K entries, d their dims.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores that exist at once: 4 MiB stay in a CPU's cache, a GPU wants large products."""
TINY = 1e-30
"""Least share of a code in an entropy: at 0 its gradient is infinite."""
FEWEST = 16
"""Latents in a tile of whole rows, however many entries there are: a product of fewer takes as long."""


def tile_of(x: Tensor) -> int:
    return TILE.get(x.device.type, TILE["cpu"])


def tiles(x: Tensor, entries: Tensor) -> Iterator[Tensor]:
    """x [n, …] in pieces whose scores against all `entries` [K, …] fit a tile."""
    yield from x.split(max(FEWEST, tile_of(x) // max(1, len(entries))))


def scores(z: Tensor, entries: Tensor, half_squares: Tensor | None) -> Tensor:
    """z · E − |E|² / 2, whose largest is the nearest entry; the dot product alone without `half_squares`. [n, d], [K, d] → [n, K]"""
    return z @ entries.T if half_squares is None else torch.addmm(-half_squares, z, entries.T)


def nearest(z: Tensor, entries: Tensor, dot: bool = False) -> Tensor:
    """z [n, d], entries [K, d] → index [n] of the nearest entry, or of the largest dot product; the first of equals."""
    with torch.autocast(z.device.type, enabled=False), torch.no_grad():
        z, first = z.float(), 0
        best, index = z.new_full((len(z),), -torch.inf), torch.zeros(len(z), dtype=torch.long, device=z.device)
        for block in entries.split(4 * math.isqrt(tile_of(z))):
            block = block.float()
            half = None if dot else block.square().sum(-1) / 2
            rows = max(1, tile_of(z) // len(block))
            for part, so_far, at in zip(z.split(rows), best.split(rows), index.split(rows), strict=True):
                score, found = scores(part, block, half).max(-1)
                better = score > so_far
                so_far.copy_(torch.where(better, score, so_far))
                at.copy_(torch.where(better, found + first, at))
            first += len(block)
        return index


def neighbours(entries: Tensor, count: int) -> Tensor:
    """entries [K, d] → int32 [K, count]: the entries nearest to each, itself left out, nearest first."""
    if not 1 <= count < len(entries):
        raise ValueError(f"{count} neighbours of each entry are asked for, a book of {len(entries)} has 1 to {len(entries) - 1}: "
                         "lower the number of neighbours")
    with torch.autocast(entries.device.type, enabled=False), torch.no_grad():
        entries = entries.float()
        half, found, first = entries.square().sum(-1) / 2, list[Tensor](), 0
        for part in tiles(entries, entries):
            score = scores(part, entries, half)
            own = torch.arange(len(part), device=part.device)
            score[own, own + first] = -torch.inf
            found.append(score.topk(count).indices.int())
            first += len(part)
        return torch.cat(found)


def entropies(z: Tensor, entries: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of p = softmax(z · E / temperature) over the entries, in nats: the mean entropy of a latent's p, which training lowers (sure
    choices), and the entropy of the mean p, which it raises (all codes in use). MAGVIT-v2, Yu et al. 2023, arXiv:2310.05737,
    equation 5. A tile's scores are computed again in the backward pass instead of kept."""
    def tile(part: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(part @ entries.T / temperature, -1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    with torch.autocast(z.device.type, enabled=False):
        z, entries = z.float(), entries.float()
        each, total = torch.zeros((), device=z.device), torch.zeros(len(entries), device=z.device)
        for part in tiles(z, entries):
            entropy, p = checkpoint(tile, part, entries, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
            each, total = each + entropy, total + p
        return each / len(z), torch.special.entr((total / len(z)).clamp_min(TINY)).sum()


class AllRows(torch.autograd.Function):
    """The chosen entry forward; backward, the softmax over all of them too, so every entry learns from every latent: index
    backpropagation (IBQ, Shi et al. 2024, arXiv:2412.02692, section 3.2). z [n, d], entries [K, d], codes [n] → [n, d]

    With q = (hard − sg(p) + p) E and p = softmax(z Eᵀ): dp = g Eᵀ, ds = p ⊙ (dp − Σ p dp), dz = ds E, dE = hardᵀ g + dsᵀ z.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, entries: Tensor, codes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(z, entries, codes)
        return entries[codes]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, entries, codes = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        grad_entries = torch.zeros_like(entries).index_add_(0, codes, grad)
        grad_z = list[Tensor]()
        for part, g in zip(tiles(z, entries), tiles(grad, entries), strict=True):
            p, dp = (part @ entries.T).softmax(-1), g @ entries.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            grad_z.append(ds @ entries)
            grad_entries.addmm_(ds.T, part)
        return torch.cat(grad_z), grad_entries, None
