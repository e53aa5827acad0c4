"""A document survives its bytes, and a conversation takes turns."""

import numpy as np
import pytest
from test_data_sequence import PAIR

from data.document import TEXT, Document, Role, TokenDocument, check_roles


def test_a_document_survives_its_bytes() -> None:
    back = TokenDocument.from_bytes(PAIR.to_bytes())
    assert back.kinds == PAIR.kinds and back.grids == PAIR.grids and back.lengths == PAIR.lengths
    assert np.array_equal(back.ids, PAIR.ids)


@pytest.mark.parametrize("roles", [("user", "assistant"), ("system", "user", "user", "assistant", "user", "assistant")])
def test_user_and_assistant_take_turns(roles: tuple[Role, ...]) -> None:
    check_roles(Document("k", ("x",) * len(roles), roles=roles))


@pytest.mark.parametrize("roles", [("assistant",), ("user",), ("system",), ("user", "system", "assistant"), ("user", "assistant", "user"),
                                   ("user", "tool", "assistant"), ("system", "assistant")])
def test_other_orders_are_no_conversation(roles: tuple[Role, ...]) -> None:
    with pytest.raises(ValueError, match="conversation: "):
        check_roles(Document("k", ("x",) * len(roles), roles=roles))
    with pytest.raises(ValueError, match="conversation: 1 roles for 2 parts"):
        check_roles(Document("k", ("x", "y"), roles=("user",)))


def test_parts_that_do_not_add_up_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        TokenDocument((TEXT,), ((0, 0),), (3,), np.array([1, 2], np.int32))
