"""Best of n by the model's own judgement: no other model is asked which of several pictures shows the prompt.

Two judges, each a reading of the same weights:

    picture     log p(picture | prompt): how likely the model finds it to have drawn this, at a temperature of 1
    caption     log p(prompt | picture): how likely it would describe the picture so (self-assessment as ILLUME's, Wang et al. 2024,
                arXiv:2412.06673, section 3.3, where it is trained for as well)

The first needs no training in describing with a prompt's words, and chooses better where that is lacking (recipes/results/generate.md).

Letters: p prompts, n pictures a prompt, b rows, s tokens, M books, h w code grid.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data import chat
from mmllm.generate.engine import Engine

Judge = Literal["picture", "caption"]


def agreement(engine: Engine, prompts: Sequence[str], codes: NDArray[np.int32], judge: Judge = "picture") -> NDArray[np.float32]:
    """How well pictures [p, n, M, h, w] show their prompts, in nats. → [p, n]"""
    vocab, encode = engine.folder.vocab, engine.folder.text.encode
    p, n, M, h, w = codes.shape
    pictures = vocab.image_ids(codes.reshape(p * n, M, h, w)).tolist()
    if judge == "picture":
        before = [list(engine.draw_requests(words, grid=(h, w))[0].prompt) for words in prompts]
        books = [vocab.first_image + m * vocab.codebook_size for m in range(M)]
        rows = [(before[i // n], picture) for i, picture in enumerate(pictures)]
        scores = log_likelihood(engine, rows, [(low, low + vocab.codebook_size) for low in books])
    else:
        start, end = ([vocab.user], [*encode(chat.DESCRIBE_REQUESTS[0]), vocab.assistant]) if engine.folder.chat else ([], [])
        said = [encode(_wanted(words)) for words in prompts]
        rows = [([vocab.bos, *start, *chat.image(picture, (h, w), vocab), *end], said[i // n]) for i, picture in enumerate(pictures)]
        scores = log_likelihood(engine, rows, [(0, vocab.first_image)])
    return scores.reshape(p, n)


@torch.inference_mode()
def log_likelihood(engine: Engine, rows: Sequence[tuple[list[int], list[int]]], ranges: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """Log-probability of each row's second ids behind its first, in nats. ranges: of ids among which they are chosen, in turn. → [b]"""
    decoder, scores = engine.decoder, list[NDArray[np.float32]]()
    for first in range(0, len(rows), engine.batch):
        part = rows[first:first + engine.batch]
        longest, most = max(len(before) + len(said) for before, said in part), max(len(said) for _, said in part)
        ids = torch.tensor([[*before, *said, *[0] * (longest - len(before) - len(said))] for before, said in part], device=decoder.device)
        place = torch.tensor([[min(len(before) + t, longest - 1) for t in range(most)] for before, _ in part], device=decoder.device)
        real = torch.tensor([[t < len(said) for t in range(most)] for _, said in part], device=decoder.device)
        row = torch.arange(len(part), device=decoder.device)[:, None]
        hidden, wanted = decoder.read(ids, decoder.room(*ids.shape), every=True)[row, place - 1], ids[row, place]  # [b, s, d], [b, s]
        total = hidden.new_zeros(len(part), dtype=torch.float32)
        for turn, (low, high) in enumerate(ranges):
            mine = slice(turn, None, len(ranges))
            known = real[:, mine]
            chosen = torch.where(known, wanted[:, mine] - low, 0)[..., None]
            logp = decoder.logits(hidden[:, mine], low, high).log_softmax(-1).gather(-1, chosen)[..., 0]
            total += torch.where(known, logp, 0).sum(1)
        scores.append(total.cpu().numpy())
    return np.concatenate(scores)


def _wanted(prompt: str) -> str:
    """A prompt without the words that ask."""
    for request in sorted(chat.DRAW_REQUESTS, key=len, reverse=True):
        if prompt.startswith(f"{request} "):
            return prompt[len(request) + 1:]
    return prompt
