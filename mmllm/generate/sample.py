"""One id a row from its logits, by inverse transform: a row's uniform number in, its id out.

The random numbers belong to a *request* (its seed and what it asks), never to a batch: number t of a request is the
same whoever stands beside it. So a picture depends on batch size and place no more than the logits do.

Letters: b rows, v ids, t steps.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SORTED = 256  # ids sorted at first for top-p: a full sort of 4,096 costs 10 × the rest of sampling on a CPU
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""A temperature or top-p beyond would be 0 or infinite where logits are divided: no id would be left."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one modality is sampled."""

    temperature: float = 1.0
    """0 takes the likeliest id."""
    top_k: int = 0
    """Only the k likeliest ids; 0 keeps all."""
    top_p: float = 1.0
    """Only the likeliest ids that together reach this probability."""

    def __post_init__(self) -> None:
        warm = self.temperature == 0 or SMALLEST <= self.temperature <= LARGEST
        if not warm or self.top_k < 0 or not SMALLEST <= self.top_p <= 1:
            raise ValueError(f"{self}: temperature must be 0 or in [{SMALLEST:.2g}, {LARGEST:.2g}], top_k at least 0, "
                             f"top_p in [{SMALLEST:.2g}, 1]")


def request_key(seed: int, number: int, prompt: Sequence[int]) -> int:
    """128 bits that name one request: which of the n pictures of which prompt under which seed."""
    payload = np.array([seed, number, *prompt], "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=16).digest(), "little")


def uniforms(keys: Sequence[int], steps: int) -> Tensor:
    """Numbers of each request. → float32 [b, t] in [0, 1 − 1e-6]; more steps only append."""
    rows = [np.random.Generator(np.random.Philox(key=key)).random(steps) for key in keys]
    return torch.from_numpy(np.minimum(np.stack(rows), 1 - 1e-6).astype(np.float32))


def sample(logits: Tensor, uniform: Tensor, how: Sampling) -> Tensor:
    """Logits [b, v] (−inf where forbidden), uniform [b] → index [b]."""
    if how.temperature == 0 or how.top_k == 1:
        return logits.argmax(-1)
    v = logits.shape[-1]
    # shifted before division: a temperature of 1e-6 must not overflow to inf − inf
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / how.temperature
    if how.top_k == 0 and how.top_p == 1.0:
        return inverse(logits.softmax(-1), uniform)
    width = min(v, how.top_k or SORTED)
    top = torch.topk(logits, width, sorted=True)
    total = logits.logsumexp(-1, keepdim=True) if how.top_k == 0 else top.values.logsumexp(-1, keepdim=True)
    p = (top.values - total).exp()  # [b, width], descending
    if how.top_k == 0 and width < v and bool((p.sum(-1) < how.top_p).any()):
        top = torch.topk(logits, v, sorted=True)
        p = (top.values - total).exp()
    if how.top_p < 1.0:
        p = p.masked_fill(p.cumsum(-1) - p >= how.top_p, 0.0)  # the id that crosses stays
    return top.indices.gather(-1, inverse(p, uniform)[:, None])[:, 0]


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """What `sample` draws from: logits [..., v] → [..., v], in float32."""
    v = logits.shape[-1]
    if how.temperature == 0 or how.top_k == 1:
        return torch.nn.functional.one_hot(logits.argmax(-1), v).float()
    p = ((logits.float() - logits.amax(-1, keepdim=True)) / how.temperature).softmax(-1)
    if how.top_k == 0 and how.top_p == 1.0:
        return p
    top = torch.topk(p, min(v, how.top_k or v), sorted=True)
    kept = top.values / top.values.sum(-1, keepdim=True)
    kept = kept.masked_fill(kept.cumsum(-1) - kept >= how.top_p, 0.0)  # the id that crosses stays
    return torch.zeros_like(p).scatter_(-1, top.indices, kept / kept.sum(-1, keepdim=True))


def inverse(p: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative weight passes uniform × total; that index has weight. [b, v], [b] → [b]."""
    cumulative = p.cumsum(-1)
    return torch.searchsorted(cumulative, uniform.to(p)[:, None] * cumulative[:, -1:], right=True)[:, 0]
