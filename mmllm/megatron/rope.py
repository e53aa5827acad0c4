"""Rotary positions: which frequency turns how fast, and where each token stands.

The one distinction: frequencies belong to the *model* (a long-context one has slower ones), positions to the *row*. They are
a function of its ids alone, so that every way of splitting a row agrees. Numbers are Hugging Face's for the same settings.

Letters: d width of a head, t tokens, h w code grid, m codes of a position.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.vocab import PLAIN_CONTROL, Vocab
from mmllm.config import Model


def frequencies(model: Model) -> Tensor:
    """[d / 2] radians a token, fastest first."""
    width, base, factor = model.head_width, model.rotary_base, model.rope_factor
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if model.rope_scaling == "linear":
        return plain / factor
    if model.rope_scaling == "llama3":
        turns = model.rope_original_len / (2 * math.pi / plain)
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)                      # 0: stretched, 1: as it was
        return (1 - kept) * plain / factor + kept * plain
    if model.rope_scaling == "yarn":
        # section 3.2 of arXiv:2309.00071, by the number of the dimension that turns so often instead of its turns
        def dimension(turns: float) -> float:
            return width * math.log(model.rope_original_len / (turns * 2 * math.pi)) / (2 * math.log(base))
        low = max(math.floor(dimension(model.rope_beta_fast)), 0)
        high = min(math.ceil(dimension(model.rope_beta_slow)), width - 1)
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain / factor * ramp + plain * (1 - ramp)
    return plain


def attention_factor(model: Model) -> float:
    """What queries and keys are multiplied by besides: it counters the softmax that longer rows flatten (yarn, equation 22)."""
    if model.rope_scaling != "yarn":
        return 1.0
    return model.rope_attention_factor if model.rope_attention_factor is not None else 0.1 * math.log(model.rope_factor) + 1.0


def softmax_scale(model: Model) -> float:
    """What products of queries and keys are multiplied by."""
    return attention_factor(model) ** 2 / math.sqrt(model.head_width)


def axes(half: int) -> Tensor:
    """[d / 2] which of time, row and column turns each frequency: a quarter, three eighths and three eighths of them, as
    Qwen2-VL's 16, 24 and 24."""
    return torch.repeat_interleave(torch.arange(3), torch.tensor([half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]))


def row_positions(borders: NDArray[np.int32]) -> NDArray[np.int64]:
    """Document borders → each token's place in its document [t]."""
    return np.arange(borders[-1]) - np.repeat(borders[:-1].astype(np.int64), np.diff(borders))


def grid_positions(tokens: NDArray[np.int64], borders: NDArray[np.int32], vocab: Vocab) -> NDArray[np.int64]:
    """Ids [t] → time, row and column of each [3, t]. arXiv:2409.12191, section 2.1: text advances all three by one; a picture
    that begins at p has its codes at (p, p + row, p + column), and what follows begins behind the largest.

    The m codes of a place differ in time: p, p + 1, … A picture is whole behind its <grid>; codes elsewhere are as text."""
    advance = np.ones(len(tokens), np.int64)
    offset = np.zeros((3, len(tokens)), np.int64)
    first_grid = vocab.text_size + len(PLAIN_CONTROL)
    announced = np.flatnonzero((tokens >= first_grid) & (tokens < vocab.first_image))
    ends = borders[np.searchsorted(borders, announced, "right")]
    for at, end in zip(announced.tolist(), ends.tolist(), strict=True):
        h, w = vocab.grids[tokens[at] - first_grid]
        codes = slice(at + 1, at + 1 + h * w * vocab.num_books)
        if codes.stop > end or (tokens[codes] < vocab.first_image).any():
            continue
        place, offset[0, codes] = np.divmod(np.arange(h * w * vocab.num_books), vocab.num_books)
        offset[1, codes], offset[2, codes] = np.divmod(place, w)
        advance[codes] = 0
        advance[codes.stop - 1] = max(h, w, vocab.num_books)
    before = np.concatenate([[0], np.cumsum(advance)])
    start = before[:-1] - np.repeat(before[borders[:-1]], np.diff(borders))
    return start + offset
