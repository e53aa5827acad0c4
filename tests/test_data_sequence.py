"""A document becomes ids and loss weights as the grammar says, in pieces where it is longer than a row."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.document import ANSWER, CAPTION, IMAGE, QUESTION, ROLE, TEXT, TokenDocument
from data.sequence import CHAT, DESCRIBE, DRAW, INTERLEAVED, TokenSequence, chat, describe, draw, interleaved, pieces
from data.vocab import Vocab

V = Vocab(text_size=50, codebook_size=8, num_books=2, grids=((2, 2),))
CODES = V.image_ids(np.arange(8).reshape(2, 2, 2) % 8)
PAIR = TokenDocument(kinds=(IMAGE, TEXT, CAPTION, QUESTION, ANSWER, QUESTION, ANSWER), grids=((2, 2), *[(0, 0)] * 6),
                     lengths=(8, 3, 2, 2, 1, 1, 1), ids=np.array([*CODES, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], np.int32))
PICTURE = [V.boi, V.grid(2, 2), *CODES.tolist(), V.eoi]


def trained(sequence: TokenSequence) -> list[int]:
    return [int(i) for i, w in zip(sequence.ids, sequence.loss_weight, strict=True) if w > 0]


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


def test_a_conversation_trains_on_the_assistant_and_on_where_it_ends() -> None:
    kinds = (TEXT + ROLE, IMAGE + 2 * ROLE, TEXT + 2 * ROLE, TEXT + 3 * ROLE, TEXT + 2 * ROLE, IMAGE + 3 * ROLE)
    document = TokenDocument(kinds, ((0, 0), (2, 2), (0, 0), (0, 0), (0, 0), (2, 2)), (1, 8, 2, 1, 1, 8),
                             np.array([9, *CODES, 1, 2, 3, 4, *CODES], np.int32))
    sequence = chat(document, V)
    assert sequence.ids.tolist() == [V.bos, V.system, 9, V.user, *PICTURE, 1, 2, V.assistant, 3, V.user, 4, V.assistant, *PICTURE, V.eos]
    assert trained(sequence) == [3, V.user, V.boi, *CODES, V.eoi, V.eos]


def test_what_is_given_may_weigh() -> None:
    assert trained(draw(PAIR, 2, V, given=0.5)) == [4, 5, V.boi, *CODES, V.eoi, V.eos]
    answers = describe(PAIR, [0], False, V, answers=3)
    assert [w for i, w in zip(answers.ids, answers.loss_weight, strict=True) if i in (8, 1, V.eos)] == [3, 1, 1]  # the description is none
    assert trained(describe(PAIR, [], True, V, given=0.5)) == [V.boi, *CODES, V.eoi, 1, 2, 3, V.eos]


parts_of = st.lists(st.tuples(st.sampled_from([TEXT, IMAGE]), st.integers(1, 40)), min_size=1, max_size=12)


@given(parts_of, st.integers(16, 60), st.booleans())
def test_pieces_join_to_the_sequence_and_no_picture_is_cut(parts: list[tuple[int, int]], row_len: int, spoken: bool) -> None:
    roles = [2 + i % 2 for i in range(len(parts))] if spoken else [0] * len(parts)
    lengths = [8 if kind == IMAGE else n for kind, n in parts]
    kinds = [kind + ROLE * role for (kind, _), role in zip(parts, roles, strict=True)]
    ids = np.concatenate([CODES if kind == IMAGE else np.full(n, 7) for (kind, _), n in zip(parts, lengths, strict=True)]).astype(np.int32)
    document = TokenDocument(tuple(kinds), tuple((2, 2) if k == IMAGE else (0, 0) for k, _ in parts), tuple(lengths), ids)
    whole = (chat if spoken else interleaved)(document, V)
    cut = pieces(kinds, lengths, CHAT if spoken else INTERLEAVED, row_len)
    if not spoken:
        assert cut  # pictures fit, and texts may be cut
    if not cut:
        return
    assert cut[0][0] == 0 and cut[-1][1] == len(whole.ids) and all(a[1] == b[0] for a, b in pairwise(cut))
    for first, end in cut:
        assert 0 < end - first <= row_len
        piece = whole[first:end].ids.tolist()
        assert piece.count(V.boi) == piece.count(V.eoi)
        assert not spoken or first == 0 or piece[0] == V.user


def test_what_is_drawn_or_described_is_never_cut() -> None:
    for task in (DRAW, DESCRIBE):
        assert pieces([IMAGE, TEXT], [8, 90], task, 50) == []
    assert pieces([IMAGE], [80], INTERLEAVED, 50) == []
