"""Best of n by the model's own judgement: of several pictures the one it would most likely describe by the prompt.

The measure is log p(prompt | picture) of the same weights, read as a description (self-assessment: ILLUME, Wang et al. 2024,
arXiv:2412.06673, section 3.3, where it is also trained for; here it costs a reading for each picture and nothing else).

Letters: p prompts, n pictures a prompt, b rows, s tokens, M books, h w code grid.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data import chat
from mmllm.generate.engine import Engine


@torch.inference_mode()
def agreement(engine: Engine, prompts: Sequence[str], codes: NDArray[np.int32]) -> NDArray[np.float32]:
    """How well pictures [p, n, M, h, w] show their prompts: log-probability, in nats, of the prompt as a description. → [p, n]"""
    vocab, encode, decoder = engine.folder.vocab, engine.folder.text.encode, engine.decoder
    p, n, _, h, w = codes.shape
    words = [encode(_wanted(prompt)) for prompt in prompts]
    asked = [vocab.user], [*encode(chat.DESCRIBE_REQUESTS[0]), vocab.assistant]
    before, behind = asked if engine.folder.chat else ([], [])
    shown = [[vocab.bos, *before, *chat.image(ids, (h, w), vocab), *behind] for ids in vocab.image_ids(codes.reshape(p * n, -1, h, w))]
    scores = np.zeros(p * n, np.float32)
    start = len(shown[0])
    for first in range(0, p * n, engine.batch):
        rows = range(first, min(first + engine.batch, p * n))
        said = [words[row // n] for row in rows]
        longest = max(map(len, said))
        ids = torch.tensor([[*shown[row], *some, *[vocab.pad] * (longest - len(some))] for row, some in zip(rows, said, strict=True)],
                           device=decoder.device)  # [b, s]
        hidden = decoder.read(ids, decoder.room(*ids.shape), every=True)[:, start - 1:-1]
        logp = decoder.logits(hidden, 0, vocab.first_image).log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]
        real = torch.tensor([[1.0] * len(some) + [0.0] * (longest - len(some)) for some in said], device=decoder.device)
        scores[first:first + len(rows)] = (logp * real).sum(1).cpu().numpy()
    return scores.reshape(p, n)


def best_of(engine: Engine, prompts: Sequence[str], n: int, **how: Any) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Draw n pictures for each prompt, as `Engine.draw` does, and order them. → codes [p, n, M, h, w], best first, and their scores."""
    codes = engine.draw(prompts, n=n, **how)
    scores = agreement(engine, prompts, codes)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(codes, order[:, :, None, None, None], 1), np.take_along_axis(scores, order, 1)


def _wanted(prompt: str) -> str:
    """A prompt without the words that ask."""
    for request in sorted(chat.DRAW_REQUESTS, key=len, reverse=True):
        if prompt.startswith(f"{request} "):
            return prompt[len(request) + 1:]
    return prompt
