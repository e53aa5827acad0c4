"""Latent perturbation: codes replaced by neighbours of theirs, as a language model's near misses replace them when it draws.

A decoder that has seen such errors in training mends them; how well is what pFID measures ("Robust Latent Matters", Qiu et al. 2025,
arXiv:2503.08354, sections 3.2 and 3.3). The paper's definition: of a share β of the pictures, a share α of the codes become one of
the δ entries nearest *to the assigned entry*. A picture is chosen by a coin of its own, so small batches are perturbed too.

Letters: b pictures, M books, h w grid, K entries, δ neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def perturb_codes(codes: Tensor, neighbours: Tensor, alpha: float, beta: float,
                  generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """codes [b, M, h, w], neighbours [M, K, δ] (`quantizer.neighbours`) → codes of the same shape. `generator`: of the CPU; with one a
    picture, what a picture draws does not depend on those beside it."""
    b, books, h, w = codes.shape

    def draw(count: int, from_: torch.Generator | None) -> tuple[Tensor, Tensor]:
        picture = torch.rand(count, 1, 1, 1, generator=from_) < beta
        place = torch.rand(count, books, h, w, generator=from_) < alpha
        return picture & place, torch.randint(neighbours.shape[-1], (count, books, h, w), generator=from_)

    drawn = [draw(1, own) for own in generator] if isinstance(generator, Sequence) else [draw(b, generator)]
    moved, pick = (torch.cat(parts).to(codes.device) for parts in zip(*drawn, strict=True))
    book = torch.arange(books, device=codes.device).view(1, -1, 1, 1)
    return torch.where(moved, neighbours[book, codes.long(), pick].to(codes.dtype), codes)
