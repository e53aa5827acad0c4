"""Latent perturbation: codes replaced by neighbours of theirs, as a language model's near misses replace them when it draws.

A decoder that has seen such errors in training mends them; how well is what pFID measures ("Robust Latent Matters", Qiu et al. 2025,
arXiv:2503.08354, sections 3.2 and 3.3). The paper's definition: of a share β of the pictures, a share α of the codes become one of
the δ entries nearest *to the assigned entry*. A picture is chosen by a coin of its own, so small batches are perturbed too.

Letters: b pictures, M books, h w grid, K entries, δ neighbours.
"""

import torch
from torch import Tensor


def perturb_codes(codes: Tensor, neighbours: Tensor, alpha: float, beta: float, generator: torch.Generator | None = None) -> Tensor:
    """codes [b, M, h, w], neighbours [M, K, δ] (`quantizer.neighbours`) → codes of the same shape. `generator`: of the CPU."""
    b, books, h, w = codes.shape
    picture = torch.rand(b, 1, 1, 1, generator=generator) < beta
    place = torch.rand(b, books, h, w, generator=generator) < alpha
    pick = torch.randint(neighbours.shape[-1], codes.shape, generator=generator)
    book = torch.arange(books).view(1, -1, 1, 1)
    near = neighbours[book.to(codes.device), codes.long(), pick.to(codes.device)].to(codes.dtype)
    return torch.where((picture & place).to(codes.device), near, codes)
