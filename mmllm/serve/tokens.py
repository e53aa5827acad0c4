"""POST /v1/mmllm/tokens: what a picture is to the model. Its codes, how likely each was, and what else might have stood there.

Probabilities are those that drawing samples from: of the entries of a code's own book, after the words and the codes before it. They are
given with the words and, as guidance compares them, without. A picture is shown as a file or as codes, so that codes can be exchanged and
looked at again.

Letters: M books, h w code grid, K entries of a book, r rows (with the words, without), n = h w M codes.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request
from pydantic import Field
from torch import Tensor

from mmllm.generate.engine import Engine
from mmllm.serve.answer import unless_gone
from mmllm.serve.pictures import Codes, data_url
from mmllm.serve.refusal import Refusal
from mmllm.serve.schema import Problem, Strict, Text
from mmllm.serve.service import Service

WAITING = 16
"""Pictures that may wait to be looked at; one is looked at at a time, beside those that are drawn."""


class TokensRequest(Strict):
    """POST /v1/mmllm/tokens, with either `picture` or `codes`."""

    model: Text | None = None
    picture: Text | None = None
    """data:image/…;base64,…"""
    codes: list[list[list[int]]] | None = Field(None, max_length=64)
    """[books][rows][columns], as an answer gives them."""
    prompt: Text | None = None
    """Words that the picture may have been drawn for."""
    top: int = Field(5, ge=0, le=32)
    """Likeliest codes to name at each place."""


@dataclass(frozen=True)
class Likelihood:
    """Of each code of a picture, after each prompt."""

    probability: Tensor  # [r, M, h, w]
    rank: Tensor  # [r, M, h, w] how many codes were likelier
    top: Tensor  # [M, h, w, top] the likeliest after the first prompt
    top_probability: Tensor  # [M, h, w, top]


@torch.inference_mode()
def likelihood(engine: Engine, prompts: Sequence[Sequence[int]], codes: Codes, top: int) -> Likelihood:
    """Codes [M, h, w] after each of the prompts, which end where the first of them would stand."""
    vocab, decoder = engine.folder.vocab, engine.decoder
    ids = torch.from_numpy(vocab.image_ids(codes)).to(decoder.device)  # [n], the books of a place together
    first, cache = decoder.start(prompts, len(ids))
    rest = decoder.read(ids[:-1].expand(len(prompts), -1), cache, every=True)  # all at once: nothing is drawn
    hidden = torch.cat([first[:, None], rest], 1)  # [r, n, d]
    chosen, ranks, best = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor]]()
    for book in range(vocab.num_books):
        low = vocab.first_image + book * vocab.codebook_size
        p = decoder.logits(hidden[:, book::vocab.num_books], low, low + vocab.codebook_size).softmax(-1)  # [r, h w, K]
        mine = p.gather(-1, (ids[book::vocab.num_books] - low).expand(len(prompts), -1)[..., None])
        chosen.append(mine[..., 0])
        ranks.append((p > mine).sum(-1))
        best.append(p[0].topk(top))

    def by_place(parts: Sequence[Tensor], dim: int) -> Tensor:
        return torch.stack(list(parts), dim).unflatten(dim + 1, codes.shape[1:]).cpu()  # M × […, h w] -> […, M, h, w]

    return Likelihood(by_place(chosen, 1), by_place(ranks, 1), by_place([codes for _, codes in best], 0), by_place([p for p, _ in best], 0))


def add_to(app: FastAPI, service: Service) -> None:
    turn, waiting = asyncio.Lock(), [0]

    async def looked_at(asked: TokensRequest) -> dict[str, Any]:
        codes = await _codes(service, asked)
        engine, words = service.engine, asked.prompt
        frame = [engine.folder.vocab.boi, engine.folder.vocab.grid(*codes.shape[1:])]
        prompts = [[engine.folder.vocab.bos, *frame]]
        if words is not None:
            service.short(len(words), "prompt")
            prompts.insert(0, list(engine.draw_requests(words, grid=codes.shape[1:])[0].prompt))
        service.fits(prompts[0], engine.grammar.longest, "prompt")
        async with turn:
            found = await asyncio.to_thread(likelihood, engine, prompts, codes, min(asked.top, engine.folder.vocab.codebook_size))
        return _answer(service, codes, found, data_url(await service.pictures.painted(codes)))

    @app.post("/v1/mmllm/tokens", responses={status: {"model": Problem} for status in (400, 401, 404, 413, 429)})
    async def tokens(asked: TokensRequest, request: Request) -> dict[str, Any]:
        """Codes of a picture and how likely each is."""
        service.known(asked.model)
        if waiting[0] >= WAITING:
            raise Refusal(429, f"{WAITING} pictures wait to be looked at: come again in 5 s", code="queue_full", retry_s=5)
        waiting[0] += 1
        try:
            return await unless_gone(request, service.metrics, looked_at(asked))
        finally:
            waiting[0] -= 1

    assert callable(tokens)


async def _codes(service: Service, asked: TokensRequest) -> Codes:
    """[M, h, w]. Errors: Refusal 400, 413."""
    if (asked.picture is None) == (asked.codes is None):
        raise Refusal(400, "give a picture or codes, one of the two", param="picture")
    if asked.picture is not None:
        file = await service.pictures.fetched(asked.picture, "picture")
        return await service.pictures.apart(lambda: service.pictures.codes(file, "picture"))
    vocab, given = service.engine.folder.vocab, asked.codes or []
    sizes = {(len(book), len(row)) for book in given for row in book}
    grids = service.pictures.sizes.values()
    if len(given) != vocab.num_books or len(sizes) != 1 or not sizes <= set(grids):
        raise Refusal(400, f"codes: they must be {vocab.num_books} books of {' or '.join(f'{h}x{w}' for h, w in grids)}", param="codes")
    if not all(0 <= code < vocab.codebook_size for book in given for row in book for code in row):
        raise Refusal(400, f"codes: a code is in [0, {vocab.codebook_size:,})", param="codes")
    return np.array(given, np.int32)


def _answer(service: Service, codes: Codes, found: Likelihood, url: str) -> dict[str, Any]:
    seen, blank = found.probability[0], found.probability[-1]
    return {"object": "mmllm.tokens", "model": service.settings.name, "grid": codes.shape[1:], "books": len(codes),
            "codebook_size": service.engine.folder.vocab.codebook_size, "codes": codes.tolist(),
            "probability": seen.tolist(), "rank": found.rank[0].tolist(), "without": blank.tolist() if len(found.probability) > 1 else None,
            "bits": _bits(seen), "bits_without": _bits(blank),
            "top": found.top.tolist(), "top_probability": found.top_probability.tolist(), "url": url}


def _bits(probability: Tensor) -> float:
    """−log₂ of all of them; what rounds to nothing counts as 1e-30."""
    return float(-probability.clamp(min=1e-30).log2().sum())
