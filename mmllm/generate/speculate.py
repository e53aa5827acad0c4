"""Several codes of a picture in one pass: speculative Jacobi decoding, with nothing but the model itself.

A window of W drafts stands behind what is known, each drawn from some distribution q. One pass gives the distribution p that each has
after those before it. A draft x stays with probability min(1, p(x) / q(x)), otherwise it is drawn anew from the positive part of p − q;
either way it is a draw from p (Leviathan et al. 2023, arXiv:2211.17192, theorem 3.5). All of the window is treated so in every pass
(Teng et al. 2024, arXiv:2410.01699, section 4; redrawing what was not reached by the same rule, so that drafts settle, is the coupling of
So et al. 2025, arXiv:2510.24211). Known afterwards: the drafts that stayed, as far as all before them did, and the first one redrawn.

Exactness: how a position's draft changes depends on earlier positions and numbers of its own, never on later ones. So given everything
that happened before it, it is a draw from its latest p; and the last p, once all before it is known, is the model's.

Relaxed, mass within a group of codes that look alike may be moved towards the draft's (groups as one: So et al. 2025, arXiv:2508.07747; a
bound on what moves: LANTERN, Jang et al. 2024, arXiv:2410.03355, section 4). Here each code is drawn from a distribution within `delta`
total variation of the model's, and every group has exactly the probability that the model gives it.

Letters: b rows, W window, K codes of a book, M books, d hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmllm.generate.cache import Cache
from mmllm.generate.decoder import Decoder
from mmllm.generate.grammar import Grammar
from mmllm.generate.request import Request
from mmllm.generate.sample import inverse, probabilities
from tokenizer.model import VisualTokenizer


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How far to decode ahead."""

    window: int = 16
    """Codes looked at in a pass."""
    delta: float = 0.0
    """Total variation by which a code's distribution may differ from the model's; 0 is exact."""
    group: int = 4
    """Codes a group has on average, where delta is not 0."""

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.delta <= 1 or self.group < 1:
            raise ValueError(f"{self}: window and group must be at least 1, delta in [0, 1]")

    def groups_of(self, visual: VisualTokenizer) -> Tensor:
        """Codes that look alike, greedily: the first code without a group takes its nearest neighbours that have none. → int64 [M, K]"""
        count = min(4 * self.group, visual.codebook_size - 1)
        near = visual.quantizer.neighbours(count).tolist() if count else [[[]] * visual.codebook_size] * visual.num_books
        groups = torch.full((visual.num_books, visual.codebook_size), -1)
        for book, of_code in enumerate(near):
            for code, others in enumerate(of_code):
                if groups[book, code] < 0:
                    alone = [other for other in others if groups[book, other] < 0 and other != code][:self.group - 1]
                    groups[book, [code, *alone]] = code
        return groups


EXACT = Speculation()


class Drawn(NamedTuple):
    """Pictures, and what they cost."""

    ids: list[list[int]]
    """Code ids of each request."""
    passes: int
    """Forward passes behind the prompts; one code at a time, it would be as many as codes, less one."""
    looked: int
    """Of all rows together: passes that each was in."""


def couple(x: Tensor, q: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """Draws x [...] from q [..., K] → draws from p [..., K], the same ones where they can be. u [..., 2] uniform."""
    at = x[..., None]
    ratio = p.gather(-1, at) / q.gather(-1, at).clamp_min(1e-30)
    rest = (p - q).clamp_min(0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # equal but for rounding
    again = inverse(rest.flatten(0, -2), u[..., 1].flatten()).view_as(x)
    return torch.where(u[..., 0] < ratio[..., 0], x, again)


def relax(p: Tensor, q: Tensor, group: Tensor, delta: float) -> Tensor:
    """The distribution nearest to q [..., K] that gives each group [..., K] the mass it has in p, or as far towards it as a total variation
    of delta from p allows. → [..., K]"""
    mass_p, mass_q = (torch.zeros_like(p).scatter_add_(-1, group, x).gather(-1, group) for x in (p, q))
    there = torch.where(mass_q > 0, q * (mass_p / mass_q.clamp_min(1e-30)), p)
    distance = (there - p).abs().sum(-1, keepdim=True) / 2
    return torch.lerp(p, there, (delta / distance.clamp_min(1e-12)).clamp_max(1.0))


@torch.inference_mode()
def draw_ahead(decoder: Decoder, grammar: Grammar, requests: Sequence[Request], how: Speculation = EXACT,
               groups: Tensor | None = None) -> Drawn:
    """Pictures of requests whose prompts end in a grid. A request's numbers are its own, so its picture depends on nobody beside it.
    groups [M, K]: needed where how.delta is not 0."""
    vocab, device = grammar.vocab, decoder.device
    (M, K), b, window = (vocab.num_books, vocab.codebook_size), len(requests), max(how.window, vocab.num_books)
    grids = [vocab.grids[request.prompt[-1] - vocab.first_grid] for request in requests]
    lengths = np.array([M * h * w for h, w in grids])
    guided = [n for n, request in enumerate(requests) if request.plan.guided]
    prompts = [tuple(request.prompt) for request in requests]
    prompts += [(*(requests[n].blank or [vocab.bos]), *prompts[n][-2:]) for n in guided]
    cache = _filled(decoder, [prompt[:-1] for prompt in prompts], int(lengths.max()) + window)
    generators = [np.random.Generator(np.random.Philox(key=request.key)) for request in requests]
    found: list[list[int]] = [[] for _ in requests]  # codes of a book, not ids
    last = np.array([prompt[-1] for prompt in prompts[:b]])  # id before the window
    going, done = np.arange(b), np.zeros(b, np.int64)
    q = torch.full((b, window, K), 1 / K, device=device)
    x = inverse(q.flatten(0, 1), _uniform(generators, window, device).flatten()).view(b, window)  # [b, W]
    passes = looked = 0
    while len(going):
        book = torch.from_numpy((done[:, None] + np.arange(window)) % M).to(device)  # [b, W]
        ids = torch.cat([torch.from_numpy(last)[:, None].to(device), vocab.first_image + book[:, :-1] * K + x[:, :-1]], 1)
        members = [requests[i] for i in going.tolist()]
        behind = [n for n, request in enumerate(members) if request.plan.guided]
        hidden = decoder.read(torch.cat([ids, ids[behind]]), cache, every=True)
        passes, looked = passes + 1, looked + len(going)
        p = _distributions(decoder, grammar, hidden, book, members, behind)
        if groups is not None and how.delta > 0:
            p = relax(p, q, groups.to(device)[book], how.delta)
        u = _uniform([generators[i] for i in going.tolist()], 3 * window, device).view(-1, window, 3)
        new = couple(x, q, p, u[..., :2])
        stayed = (new == x).long().cumprod(1).sum(1).cpu().numpy()
        count = np.minimum(np.minimum(stayed + 1, window), lengths[going] - done)
        for i, codes, known in zip(going.tolist(), new.tolist(), count.tolist(), strict=True):
            found[i] += codes[:known]
        last = (vocab.first_image + (done + count - 1) % M * K + np.array([found[i][-1] for i in going.tolist()]))
        done = done + count
        # the window moves on; what comes into it is drafted as the last code before it of its book
        place = torch.from_numpy(count[:, None] + np.arange(window)).to(device)  # [b, W]
        beyond = (place - window + 1).clamp_min(0)
        source = place - (beyond + M - 1) // M * M
        q = p.gather(1, source[..., None].expand_as(p))
        fresh = inverse(q.flatten(0, 1), u[..., 2].flatten()).view_as(x)
        x = torch.where(beyond > 0, fresh, new.gather(1, source))
        cache.length[:len(going)] -= window - count
        cache.length[len(going):len(going) + len(behind)] -= window - count[behind]
        keep = np.flatnonzero(done < lengths[going])
        if len(keep) < len(going):
            left = set(keep.tolist())
            cache.keep([*keep.tolist(), *(len(going) + m for m, n in enumerate(behind) if n in left)])
            going, done, last, q, x = going[keep], done[keep], last[keep], q[keep], x[keep]
    ids_of = [vocab.image_ids(np.array(codes).reshape(h, w, M).transpose(2, 0, 1)).tolist()
              for codes, (h, w) in zip(found, grids, strict=True)]
    return Drawn(ids_of, passes, looked)


def _filled(decoder: Decoder, prompts: Sequence[tuple[int, ...]], more: int) -> Cache:
    """A cache that holds the prompts, a row each, and room for `more`. A prompt that several have is read once."""
    unique, columns = list(dict.fromkeys(prompts)), max(map(len, prompts))
    store, cache = decoder.room(len(unique), columns), decoder.room(len(prompts), columns + more)
    decoder.prefill(unique, store)
    order = [unique.index(prompt) for prompt in prompts]
    cache.store[..., :columns, :] = store.store[:, :, order]
    cache.length[:] = store.length[order]
    return cache


def _uniform(generators: Sequence[np.random.Generator], count: int, device: torch.device) -> Tensor:
    """The next numbers of each request [b, count]."""
    drawn = np.stack([generator.random(count) for generator in generators])
    return torch.from_numpy(np.minimum(drawn, 1 - 1e-6).astype(np.float32)).to(device)


def _distributions(decoder: Decoder, grammar: Grammar, hidden: Tensor, book: Tensor, requests: Sequence[Request],
                   behind: list[int]) -> Tensor:
    """What each code is drawn from: hidden [rows, W, d], of all requests and then the blank ones of those `behind`; book [b, W]
    → [b, W, K]"""
    def logits(hidden: Tensor, book: Tensor) -> Tensor:
        vocab = grammar.vocab
        out = hidden.new_empty(*book.shape, vocab.codebook_size, dtype=torch.float32)
        for m in range(vocab.num_books):
            low = vocab.first_image + m * vocab.codebook_size
            out[book == m] = decoder.logits(hidden[book == m], low, low + vocab.codebook_size)
        return out

    seen = logits(hidden[:len(requests)], book)
    if behind:
        guidance = torch.tensor([requests[n].plan.guidance for n in behind], device=hidden.device)[:, None, None]
        blank = logits(hidden[len(requests):], book[behind])
        seen[behind] = blank + guidance * (seen[behind] - blank)
    ways = {request.plan.image for request in requests}
    if len(ways) == 1:
        return probabilities(seen, ways.pop())
    for way in ways:
        members = [n for n, request in enumerate(requests) if request.plan.image == way]
        seen[members] = probabilities(seen[members], way)
    return seen
