"""Worker processes change nothing but the waiting."""

import dataclasses

import numpy as np
import pytest
from small_world import small_world

from data.config import DataConfig
from data.loader import Loader
from data.prefetch import prefetched


def loader() -> Loader:
    return Loader(DataConfig(shards=small_world().tokens, row_len=512, block_len=64))


def test_rows_come_in_order_whatever_the_number_of_workers() -> None:
    numbers = [*range(5, 30), 2, 90, 7]
    wanted = [loader().row(number) for number in numbers]
    for workers in (0, 1, 2):
        found = list(prefetched(loader(), iter(numbers), workers, depth=2))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))


def test_an_error_of_a_worker_is_raised_where_rows_are_used() -> None:
    short = Loader(DataConfig(shards=small_world().tokens, row_len=20))
    with pytest.raises(ValueError, match=r"a row holds 20: raise data.row_len"):
        list(prefetched(short, [0], 1))
