"""Weighted k-means over the latents of all ranks: what a codebook starts from.

Letters: n latents (of this rank), d their dims, K centres.
"""

import torch
from torch import Tensor

from tokenizer.nearest import nearest
from tokenizer.ranks import counts_of_ranks, joined, rank, rows_of_ranks, sum_over_ranks

SPREAD = 4096
"""Up to so many centres are spread by k-means++, which takes a pass over the latents for each; more are drawn at once."""


@torch.no_grad()
def kmeans(x: Tensor, weight: Tensor, count: int, rounds: int, seed: int) -> Tensor:
    """x [n, d], weight [n] → centres [count, d]. Two ranks find what one finds on their joined latents. Started by k-means++ (Arthur
    and Vassilvitskii 2007, section 2.2), so far-apart points get a centre each before any crowd gets two; empty clusters move to
    the worst-served points."""
    centres = _spread(x, weight, count, seed) if count <= SPREAD else _drawn(x, weight, count, seed)
    for _ in range(rounds):
        index = nearest(x, centres)
        grown = torch.zeros(count, x.shape[1] + 1, device=x.device)
        grown.index_add_(0, index, torch.cat([x * weight[:, None], weight[:, None]], -1))
        total, mass = sum_over_ranks(grown).split([x.shape[1], 1], -1)
        error = joined((x - centres[index]).square().sum(-1) * weight)
        empty = (mass[:, 0] == 0).nonzero().squeeze(-1)
        centres = torch.where(mass > 0, total / mass.clamp_min(1e-12), centres)
        if len(empty):
            worst = error.topk(min(len(empty), len(error))).indices
            centres[empty[:len(worst)]] = rows_of_ranks(x, worst)
    return centres


def _drawn(x: Tensor, weight: Tensor, count: int, seed: int) -> Tensor:
    """Different latents, drawn by weight."""
    keys = joined(weight).double().cpu().log()
    keys -= torch.empty_like(keys).exponential_(generator=torch.Generator().manual_seed(seed)).log()
    return _filled(rows_of_ranks(x, keys.topk(min(count, len(keys))).indices.to(x.device)), count, seed)


def _spread(x: Tensor, weight: Tensor, count: int, seed: int) -> Tensor:
    """Latents one after another, each drawn by weight × squared distance to those before."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.empty(count, x.shape[1], device=x.device)
    distance, first = torch.ones(len(x), device=x.device), sum(counts_of_ranks(len(x), x.device)[:rank()])
    for number in range(count):
        chance = (distance * weight).double().cumsum(0)
        masses = joined(chance[-1:] if len(chance) else torch.zeros(1, dtype=torch.float64, device=x.device)).cpu()
        if masses.sum() <= 0:
            return _filled(centres[:number], count, seed)
        aim = torch.rand((), dtype=torch.float64, generator=generator) * masses.sum() - masses[:rank()].sum()
        mine = 0 <= aim < masses[rank()]
        place = int(torch.searchsorted(chance, aim.to(chance.device), right=True).clamp_max(len(x) - 1)) if mine else 0
        index = sum_over_ranks(torch.tensor([first + place if mine else 0], device=x.device))
        centres[number] = rows_of_ranks(x, index)[0]
        away = (x - centres[number]).square().sum(-1)
        distance = away if number == 0 else torch.minimum(distance, away)
    return centres


def _filled(centres: Tensor, count: int, seed: int) -> Tensor:
    """Fewer distinct points than centres: the others wait beside points that exist, to be revived."""
    generator = torch.Generator().manual_seed(seed)
    like = torch.randint(len(centres), (count - len(centres),), generator=generator).to(centres.device)
    noise = torch.randn(len(like), centres.shape[1], generator=generator).to(centres)
    spread = centres.std() if centres.numel() > 1 else torch.ones((), device=centres.device)
    return torch.cat([centres, centres[like] + 0.5 * noise * spread])
