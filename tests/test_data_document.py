"""A document becomes ids and loss weights as the grammar says, and survives its bytes."""

import numpy as np
import pytest

from data.document import (
    ANSWER,
    CAPTION,
    IMAGE,
    QUESTION,
    TEXT,
    TokenDocument,
    TokenSequence,
    describe,
    draw,
    interleaved,
    uniform,
)
from data.vocab import Vocab

V = Vocab(text_size=50, codebook_size=8, num_books=2, grids=((2, 2),))
CODES = V.image_ids(np.arange(8).reshape(2, 2, 2) % 8)
PAIR = TokenDocument(kinds=(IMAGE, TEXT, CAPTION, QUESTION, ANSWER, QUESTION, ANSWER), grids=((2, 2), *[(0, 0)] * 6),
                     lengths=(8, 3, 2, 2, 1, 1, 1), ids=np.array([*CODES, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], np.int32))
PICTURE = [V.boi, V.grid(2, 2), *CODES.tolist(), V.eoi]


def trained(sequence: TokenSequence) -> list[int]:
    return [int(i) for i, w in zip(sequence.ids, sequence.loss_weight, strict=True) if w > 0]


def test_a_document_survives_its_bytes() -> None:
    back = TokenDocument.from_bytes(PAIR.to_bytes())
    assert back.kinds == PAIR.kinds and back.grids == PAIR.grids and back.lengths == PAIR.lengths
    assert np.array_equal(back.ids, PAIR.ids)


def test_drawing_trains_on_codes_and_their_end_alone() -> None:
    sequence = draw(PAIR, 2, V)
    assert sequence.ids.tolist() == [V.bos, 4, 5, *PICTURE, V.eos]
    assert trained(sequence) == [*CODES, V.eoi, V.eos]


def test_a_dropped_caption_leaves_the_picture() -> None:
    assert draw(PAIR, None, V).ids.tolist() == [V.bos, *PICTURE, V.eos]


def test_describing_trains_on_the_description_and_the_answers_with_their_ends() -> None:
    sequence = describe(PAIR, [1, 0], True, V)
    assert sequence.ids.tolist() == [V.bos, *PICTURE, 1, 2, 3, V.user, 9, V.assistant, 10, V.user, 6, 7, V.assistant, 8, V.eos]
    assert trained(sequence) == [1, 2, 3, V.user, 10, V.user, 8, V.eos]


def test_a_description_may_come_last_as_the_answer_to_an_empty_question() -> None:
    sequence = describe(PAIR, [1], False, V)
    assert sequence.ids.tolist() == [V.bos, *PICTURE, V.user, 9, V.assistant, 10, V.user, V.assistant, 1, 2, 3, V.eos]
    assert trained(sequence) == [10, V.user, 1, 2, 3, V.eos]


def test_an_interleaved_document_is_read_in_order_and_its_grid_is_given() -> None:
    document = TokenDocument((TEXT, IMAGE, TEXT), ((0, 0), (2, 2), (0, 0)), (2, 8, 1), np.array([1, 2, *CODES, 3], np.int32))
    sequence = interleaved(document, V)
    assert sequence.ids.tolist() == [V.bos, 1, 2, *PICTURE, 3, V.eos]
    assert trained(sequence) == [1, 2, V.boi, *CODES, V.eoi, 3, V.eos]


def test_choices_are_uniform_and_depend_on_everything_that_names_them() -> None:
    keys = np.arange(20_000, dtype=np.uint64)
    u = uniform(1, keys, 0, 0)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs((u < 0.1).mean() - 0.1) < 0.01
    for other in (uniform(2, keys, 0, 0), uniform(1, keys, 1, 0), uniform(1, keys, 0, 1)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    assert np.array_equal(u[7:8], uniform(1, keys[7:8], 0, 0))


def test_parts_that_do_not_add_up_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        TokenDocument((TEXT,), ((0, 0),), (3,), np.array([1, 2], np.int32))
