"""Sharing a packed row among context-parallel ranks: every token once, documents whole, work even."""

import numpy as np
import pytest

from mmllm.megatron.context import lengthened, share

LENGTHS = [7, 33, 1, 64, 20, 90]


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_lengthened_documents_keep_their_tokens_in_order(cp: int) -> None:
    borders, length = np.cumsum([0, *LENGTHS]).astype(np.int32), 2 * cp * 60
    new, place = lengthened(borders, cp, length, tail=2 * cp * 3)
    assert (np.diff(new) % (2 * cp) == 0).all()
    assert (np.diff(new) > 0).all()
    assert new[-1] == length
    for i, n in enumerate(LENGTHS):
        assert place[borders[i]:borders[i + 1]].tolist() == list(range(new[i], new[i] + n))
        assert 0 <= new[i + 1] - new[i] - n < 2 * cp
    assert max(np.diff(new)[len(LENGTHS):]) <= 2 * cp * 3


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_each_token_has_one_rank_and_all_ranks_the_same_work(cp: int) -> None:
    borders = np.cumsum([0, *(2 * cp * n for n in (3, 1, 10, 5))]).astype(np.int32)
    shares = [share(borders, cp, rank) for rank in range(cp)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(borders[-1]))
    position = np.arange(borders[-1]) - np.repeat(borders[:-1], np.diff(borders))
    assert len({int(position[mine].sum()) for mine in shares}) == 1             # keys that queries look at


def test_the_pieces_are_transformer_engines() -> None:
    # thd_get_partitioned_indices for documents of 8 and 16 tokens and 2 ranks: pieces 0 and 3, 1 and 2
    borders = np.array([0, 8, 24], np.int32)
    assert share(borders, 2, 0).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert share(borders, 2, 1).tolist() == [2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 18, 19]
