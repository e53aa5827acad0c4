"""Chance is uniform, depends on all that names it, and a shuffle is a permutation of any size."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.chance import shuffled, uniform


def test_choices_are_uniform_and_depend_on_everything_that_names_them() -> None:
    keys = np.arange(20_000, dtype=np.uint64)
    u = uniform(1, keys, 0, 0)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs((u < 0.1).mean() - 0.1) < 0.01
    for other in (uniform(2, keys, 0, 0), uniform(1, keys, 1, 0), uniform(1, keys, 0, 1)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    assert np.array_equal(u[7:8], uniform(1, keys[7:8], 0, 0))


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_a_shuffle_holds_each_element_once(size: int, salt: int) -> None:
    assert sorted(shuffled(np.arange(size), size, salt).tolist()) == list(range(size))


def test_shuffles_look_shuffled_and_differ_by_salt() -> None:
    a, b = (shuffled(np.arange(10_000), 10_000, salt) for salt in (1, 2))
    assert abs(np.corrcoef(a, np.arange(10_000))[0, 1]) < 0.03 and abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03 and (a == b).mean() < 0.001


def test_one_element_of_a_shuffle_of_ten_to_the_twelve_needs_no_others() -> None:
    some = shuffled(np.arange(5, 10), 10**12, 3)
    assert len(set(some.tolist())) == 5 and some.min() >= 0 and some.max() < 10**12
    assert shuffled(np.array([7]), 10**12, 3)[0] == some[2]
