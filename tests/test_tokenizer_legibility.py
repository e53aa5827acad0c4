"""Words are drawn where they say, read by whoever is asked, and scored by the letter."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tokenizer.legibility import LINE, Legibility, Picture, cases, characters, legibility, line, tesseract

SETTINGS = Legibility(heights=(8, 12, 16), words=4)
PHOTOGRAPH = (np.indices((64, 64)).sum(0)[..., None] * np.array([1, 2, 1])).clip(0, 255).astype(np.uint8)


def same(pictures: Picture) -> Picture:
    return pictures


def grey(pictures: Picture) -> Picture:
    return np.full_like(pictures, 128)


def test_a_reader_that_knows_the_words_scores_one_and_a_blind_one_nothing() -> None:
    truth = [case.word for case in cases(SETTINGS, 64, [PHOTOGRAPH])]
    rows, _ = legibility(SETTINGS, 64, [PHOTOGRAPH], same, lambda lines: [word for word in truth for _ in range(2)])
    assert all(row[side] == {"characters": 1, "words": 1} for row in rows for side in ("original", "rebuilt"))
    assert {(row["ground"], row["height"]) for row in rows} == {(g, h) for g in ("plain", "photograph") for h in (8, 12, 16)}
    rows, _ = legibility(SETTINGS, 64, [], grey, lambda lines: [""] * len(lines))
    assert all(row["rebuilt"] == {"characters": 0, "words": 0} for row in rows)


def test_original_and_reconstruction_are_read_apart() -> None:
    truth = [case.word for case in cases(SETTINGS, 64, [])]

    def read(lines: Sequence[Picture]) -> list[str]:
        return [truth[at // 2].upper() if cut.std() > 1 else "" for at, cut in enumerate(lines)]

    rows, reads = legibility(SETTINGS, 64, [], grey, read, batch=3)
    assert all(row["original"]["words"] == 1 and row["rebuilt"]["words"] == 0 for row in rows)
    assert all(one.said == (one.case.word, "") for one in reads)


def test_words_depend_on_the_seed_alone() -> None:
    first, again, other = ([*cases(replace(SETTINGS, seed=seed), 64, [PHOTOGRAPH])] for seed in (0, 0, 1))
    assert all(np.array_equal(a.picture, b.picture) and a[:4] == b[:4] for a, b in zip(first, again, strict=True))
    assert [case.word for case in first] != [case.word for case in other]


@pytest.mark.parametrize("photographs", [[], [PHOTOGRAPH]])
def test_ink_is_in_the_box_and_nowhere_else(photographs: list[Picture]) -> None:
    for case in cases(SETTINGS, 64, photographs):
        left, top, right, bottom = case.box
        ground = case.picture[0, 0] if case.ground == "plain" and not (left == top == 0) else None
        base = PHOTOGRAPH if case.ground == "photograph" else np.broadcast_to(ground, (64, 64, 3)) if ground is not None else None
        if base is not None:
            ink = (case.picture != base).any(-1)
            assert ink[top:bottom, left:right].any() and ink.sum() == ink[top:bottom, left:right].sum()


def test_a_line_has_text_of_one_height_whatever_it_was() -> None:
    for case in cases(SETTINGS, 64, []):
        cut, (left, top, right, bottom) = line(case.picture, case), case.box
        margin = (case.height + 1) // 2
        assert cut.shape[0] == round((bottom - top + 2 * margin) * LINE / case.height)
        assert cut.shape[1] == round((right - left + 2 * margin) * LINE / case.height)


def test_a_height_at_which_no_word_fits_is_left_out_and_none_at_all_is_refused() -> None:
    assert {case.height for case in cases(SETTINGS, 32, [])} == {8}
    with pytest.raises(ValueError, match="fits 12 px"):
        legibility(SETTINGS, 12, [], same, lambda lines: [])


def test_a_digit_is_as_high_as_asked() -> None:
    for case in cases(replace(SETTINGS, heights=(20,)), 128, []):
        if case.word.isdigit():
            assert case.box[3] - case.box[1] in (20, 21, 22)


def test_characters_is_the_edit_distance_of_the_recursion() -> None:
    @cache
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in [("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("0123", "9"), ("ab", "ba"), ("", "")]:
        assert characters(a, b) == pytest.approx(1 - distance(a, b) / max(len(a), len(b), 1))


def test_a_missing_font_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no font .*none\.ttf"):
        Legibility(font=tmp_path / "none.ttf")


@pytest.mark.skipif(tesseract() is None, reason="the tesseract program is not installed")
def test_tesseract_reads_originals_and_not_what_was_wiped_out() -> None:
    read = tesseract()
    assert read is not None
    rows, _ = legibility(Legibility(heights=(12, 16), words=6), 128, [], grey, read)
    assert all(row["original"]["characters"] > 0.9 and row["rebuilt"]["characters"] < 0.1 for row in rows)
