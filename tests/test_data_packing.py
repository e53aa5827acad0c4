"""Packing puts every document in exactly one row, whole, and wastes little."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import pack


@given(st.lists(st.integers(1, 64), max_size=300), st.integers(1, 80))
def test_every_document_lands_in_exactly_one_row(lengths: list[int], window: int) -> None:
    rows = pack(lengths, row_len=64, window=window)
    assert sorted(doc for row in rows for doc in row) == list(range(len(lengths)))
    assert all(sum(lengths[doc] for doc in row) <= 64 for row in rows)


def test_short_documents_fill_rows_to_99_percent() -> None:
    lengths = np.random.default_rng(0).integers(30, 130, 20_000).tolist()
    assert sum(lengths) / (len(pack(lengths, 1024)) * 1024) > 0.99


def test_a_document_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"document 1 has 65 tokens but a row holds 64.*data.row_len"):
        pack([3, 65], 64)


def test_rows_hold_the_mixture_as_it_comes() -> None:
    lengths = np.random.default_rng(1).choice([45, 130], 4000)
    shares = [np.mean([lengths[doc] == 130 for doc in row]) for row in pack(lengths.tolist(), 1024)[:-1]]
    assert 0.4 < np.mean(shares) < 0.6 and np.mean([0 < share < 1 for share in shares]) > 0.99
