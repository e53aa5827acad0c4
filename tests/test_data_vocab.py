"""Codes and ids are two names of one thing; every id has one meaning."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.vocab import Vocab

VOCAB = Vocab(text_size=300, codebook_size=16, num_books=2, grids=((2, 3), (4, 4)))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_codes_become_ids_and_come_back(books: int, h: int, w: int, seed: int) -> None:
    vocab = Vocab(text_size=10, codebook_size=7, num_books=books)
    codes = np.random.default_rng(seed).integers(0, 7, (books, h, w))
    ids = vocab.image_ids(codes)
    assert len(ids) == books * h * w and ids.min() >= vocab.first_image and ids.max() < vocab.size
    assert np.array_equal(vocab.codes(ids, h, w), codes)


def test_every_id_has_one_meaning_and_a_name_of_its_own() -> None:
    control = [VOCAB.pad, VOCAB.bos, VOCAB.eos, VOCAB.boi, VOCAB.eoi, VOCAB.user, VOCAB.assistant, VOCAB.system,
               VOCAB.grid(2, 3), VOCAB.grid(4, 4)]
    assert control == list(range(300, VOCAB.first_image))
    names = [VOCAB.token_name(i) for i in range(300, VOCAB.size)]
    assert len(set(names)) == len(names) and names[:2] == ["<pad>", "<bos>"] and names[-1] == "<image_1_00015>"


def test_the_books_of_a_position_stand_together() -> None:
    ids = VOCAB.image_ids(np.arange(12).reshape(2, 2, 3))
    assert [VOCAB.token_name(int(i)) for i in ids[:4]] == ["<image_0_00000>", "<image_1_00006>", "<image_0_00001>", "<image_1_00007>"]


@pytest.mark.parametrize("codes", [np.zeros((1, 2, 3)), np.full((2, 2, 3), 16), np.full((2, 2, 3), -1)])
def test_codes_that_are_none_are_refused(codes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="codes"):
        VOCAB.image_ids(codes)


def test_ids_of_the_wrong_book_are_refused() -> None:
    ids = VOCAB.image_ids(np.zeros((2, 2, 3), int))
    with pytest.raises(ValueError, match="no code of its book"):
        VOCAB.codes(ids[::-1], 2, 3)


def test_an_unknown_grid_is_named() -> None:
    with pytest.raises(ValueError, match="9x9"):
        VOCAB.grid(9, 9)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    VOCAB.save(tmp_path / "vocab.json")
    assert Vocab.load(tmp_path / "vocab.json") == VOCAB and json.loads((tmp_path / "vocab.json").read_text())["num_books"] == 2
