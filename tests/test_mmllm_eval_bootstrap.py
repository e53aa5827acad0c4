"""Intervals hold what they promise, and what belongs together is resampled together."""

from typing import Any

import numpy as np
import pytest

from mmllm.evaluate import bootstrap
from mmllm.evaluate.bootstrap import Measure, difference, mean, number, resampled, weights
from mmllm.evaluate.captions import overlap


def names(count: int) -> list[str]:
    return [f"unit {i}" for i in range(count)]


def test_an_interval_of_95_percent_holds_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(400):
        found = number(mean(names(60), random.random(60) < 0.6), 400, trial)
        inside += found["low"] <= 0.6 <= found["high"]
    assert 0.91 < inside / 400 < 0.98


def test_a_resample_is_what_drawing_units_one_by_one_gives() -> None:
    random = np.random.default_rng(1)
    rows = random.integers(1, 9, (7, 2)).astype(float)
    measure = Measure(units=tuple(names(7)), rows=rows)
    slow = []
    for weight in np.concatenate(list(weights(7, 50, 3))):
        drawn = np.concatenate([np.repeat(rows[i:i + 1], int(times), 0) for i, times in enumerate(weight)])
        assert len(drawn) == 7
        slow.append(drawn[:, 0].sum() / drawn[:, 1].sum())
    np.testing.assert_allclose(resampled(measure, 50, 3), slow)


def test_resamples_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = mean(names(11), np.arange(11))
    whole = resampled(measure, 100, 0)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 30)
    np.testing.assert_array_equal(resampled(measure, 100, 0), whole)


def test_bleu_of_summed_rows_is_the_library_s_bleu_of_the_texts() -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu

    said = {0: ["a red star on a grey ground"], 1: ["a blue star"], 2: ["two rings"], 3: ["a red star above a ring"]}
    wanted = {0: ["a red star on a grey background"], 1: ["a blue star", "one star that is blue"], 2: ["two green rings and a star"],
              3: ["a ring below a red star", "a red star above a ring"]}
    rows = overlap(said, wanted)["bleu"]
    library: Any = Bleu(4).compute_score(wanted, said, verbose=0)[0]
    for length in range(1, 5):
        columns = [*range(length), *range(4, 4 + length), -2, -1]
        assert Measure(units=tuple(names(4)), rows=rows[:, columns], of="bleu").value == pytest.approx(library[length - 1], rel=1e-6)


def test_answers_about_one_picture_count_as_one_draw() -> None:
    alike = np.repeat(np.random.default_rng(2).random(40) < 0.5, 5)  # five answers a picture, all right or all wrong
    together = Measure(units=tuple(names(40)), rows=np.stack([alike.reshape(40, 5).sum(1), np.full(40, 5)], 1).astype(float))
    apart = mean(names(200), alike)
    wide, narrow = number(together, 1000, 0), number(apart, 1000, 0)
    assert wide["value"] == narrow["value"]
    assert wide["error"] == pytest.approx(narrow["error"] * 5**0.5, rel=0.15)


def test_the_mean_over_skills_does_not_weigh_them_by_their_prompts() -> None:
    rows = np.zeros((40, 4))
    rows[:30, 0], rows[:30, 1], rows[30:, 3] = 1, 1, 1  # 30 right of one skill, 10 wrong of another
    assert Measure(units=tuple(names(40)), rows=rows, of="macro").value == 0.5


def test_a_paired_difference_does_not_depend_on_the_order_of_units_and_is_surer_than_two_samples() -> None:
    random = np.random.default_rng(3)
    hard = random.random(80)
    before = mean(names(80), hard)
    order = random.permutation(80)
    after = mean([names(80)[i] for i in order], (hard + 0.01 + 0.01 * random.random(80))[order])
    found = difference(before, after, 500, 0)
    assert found["paired"] and 0 < found["low"] < found["value"] < found["high"] < 0.03
    others = difference(before, mean([f"other {i}" for i in range(80)], after.rows[:, 0]), 500, 0)
    assert not others["paired"] and others["low"] < 0 < others["high"]


def test_a_difference_to_itself_is_nothing() -> None:
    same = mean(names(9), np.arange(9))
    assert difference(same, same, 200, 0) == {"value": 0.0, "low": 0.0, "high": 0.0, "paired": True}
