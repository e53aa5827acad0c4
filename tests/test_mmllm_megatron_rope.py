"""Rotary frequencies are Hugging Face's, and positions follow from the ids alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.vocab import Vocab
from mmllm.config import Model
from mmllm.megatron import rope

MODEL = Model(num_layers=1, hidden_size=256, num_attention_heads=4, ffn_hidden_size=32, rotary_base=500_000.0)
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}}
OURS = {"factor": "rope_factor", "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_len", "beta_fast": "rope_beta_fast", "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor"}


def theirs(kind: str, fields: dict[str, Any]) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=32_768,
                         rope_parameters={"rope_type": kind, "rope_theta": 500_000.0, **fields})
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.5}, {"beta_fast": 20.0}, {"factor": 1.0}])
def test_frequencies_and_attention_factor_are_hugging_faces(kind: str, more: dict[str, Any]) -> None:
    fields = {**SCALINGS[kind], **({} if kind != "yarn" and more.keys() & {"attention_factor", "beta_fast"} else more)}
    model = replace(MODEL, rope_scaling=kind, **{OURS[name]: value for name, value in fields.items()})
    expected, factor = theirs(kind, fields)
    torch.testing.assert_close(rope.frequencies(model), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor(model) == pytest.approx(factor)


def test_plain_frequencies_are_those_of_the_paper() -> None:
    torch.testing.assert_close(rope.frequencies(MODEL), 500_000.0 ** (-torch.arange(0, 64, 2) / 64))


@pytest.mark.parametrize("half", [8, 32, 64])
def test_frequencies_are_shared_as_in_qwen2_vl(half: int) -> None:
    assert torch.bincount(rope.axes(half)).tolist() == [half // 4, 3 * half // 8, 3 * half // 8]


VOCAB = Vocab(text_size=10, codebook_size=20, num_books=2, grids=((2, 2), (1, 3)))


def picture(h: int, w: int) -> list[int]:
    codes = VOCAB.image_ids(np.arange(2 * h * w).reshape(2, h, w) % 20)
    return [VOCAB.boi, VOCAB.grid(h, w), *codes.tolist(), VOCAB.eoi]


def slow_positions(ids: list[int]) -> list[tuple[int, int, int]]:
    """One document, a token at a time."""
    out, at, i = list[tuple[int, int, int]](), 0, 0
    while i < len(ids):
        out.append((at, at, at))
        at, i = at + 1, i + 1
        for h, w in VOCAB.grids:
            if ids[i - 1] == VOCAB.grid(h, w) and len(ids) >= i + 2 * h * w and min(ids[i:i + 2 * h * w]) >= VOCAB.first_image:
                out += [(at + book, at + row, at + column) for row in range(h) for column in range(w) for book in range(2)]
                at, i = at + max(h, w, 2), i + 2 * h * w
    return out


def test_codes_stand_at_their_place_in_the_picture_and_text_goes_on_behind() -> None:
    documents = [[VOCAB.bos, 1, 2, *picture(2, 2), 3, *picture(1, 3), VOCAB.eos], [VOCAB.bos, *picture(1, 3)[:-3]],
                 [VOCAB.first_image] * 4, [5], picture(2, 2) * 2]
    borders = np.cumsum([0, *map(len, documents)]).astype(np.int32)
    found = rope.grid_positions(np.concatenate(documents).astype(np.int64), borders, VOCAB)
    assert found.T.tolist() == [list(place) for document in documents for place in slow_positions(document)]


def test_without_pictures_a_grid_is_a_row() -> None:
    borders = np.array([0, 3, 10, 11], np.int32)
    found = rope.grid_positions(np.ones(11, np.int64), borders, VOCAB)
    assert (found == rope.row_positions(borders)).all()
    assert rope.row_positions(borders).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0]
