"""Text survives its tokenizer, whatever it holds."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.text import TextTokenizer, train

TOKENIZER = train([f"a {c} {s} above two {c} {s}s" for c in ("red", "green", "blue") for s in ("star", "ring", "cross")] * 20, 400)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁\x00"), max_size=40))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_frequent_words_are_one_piece() -> None:
    assert len(TOKENIZER.encode("a red star")) == 3


def test_a_small_world_gives_a_smaller_vocabulary_instead_of_an_error() -> None:
    assert 256 < train(["red star"] * 10, 5000).size < 300


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "text.model")
    loaded = TextTokenizer.load(tmp_path / "text.model")
    assert loaded.fingerprint == TOKENIZER.fingerprint and loaded.encode("a blue ring") == TOKENIZER.encode("a blue ring")


@pytest.mark.parametrize("text", ["", " ", "  two  spaces "])
def test_spaces_survive(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
