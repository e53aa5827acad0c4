"""Conversations: what is read, what is learned, and rows of them."""

import numpy as np
import pytest
import tiny_model

from data import chat
from data.config import DataConfig

VOCAB, TEXT = tiny_model.vocabulary(), tiny_model.text_tokenizer()
CODES = np.arange(18).reshape(2, 3, 3)
SHOWN = {"type": "image", "codes": CODES}


def said(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def learned(turns: list[dict[str, object]]) -> list[int]:
    sequence = chat.conversation(turns, VOCAB, TEXT.encode)
    return sequence.ids[sequence.loss_weight > 0].tolist()


def test_only_what_the_assistant_says_and_the_token_that_ends_it_is_learned() -> None:
    turns = [{"role": "user", "content": [SHOWN, said("how many?")]}, {"role": "assistant", "content": "two."},
             {"role": "user", "content": "what colour?"}, {"role": "assistant", "content": "red."}]
    assert learned(turns) == [*TEXT.encode("two."), VOCAB.user, *TEXT.encode("red."), VOCAB.eos]


def test_a_drawn_picture_is_learned_but_for_its_grid() -> None:
    turns = [{"role": "user", "content": "draw a red star"}, {"role": "assistant", "content": [SHOWN]}]
    assert learned(turns) == [VOCAB.boi, *VOCAB.image_ids(CODES), VOCAB.eoi, VOCAB.eos]


def test_a_prompt_is_the_beginning_of_the_conversation_it_asks_for() -> None:
    asked = [{"role": "user", "content": [SHOWN, said("how many?")]}]
    whole = chat.conversation([*asked, {"role": "assistant", "content": "two."}], VOCAB, TEXT.encode).ids.tolist()
    prompt = chat.prompt(asked, VOCAB, TEXT.encode)
    assert whole == [*prompt, *TEXT.encode("two."), VOCAB.eos] and prompt[-1] == VOCAB.assistant


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user", "assistant"], ["user", "system", "assistant"],
                                   ["system", "assistant"], ["user"], []])
def test_turns_that_do_not_alternate_from_the_user_to_the_assistant_are_refused(roles: list[str]) -> None:
    with pytest.raises(ValueError, match="turn"):
        chat.conversation([{"role": role, "content": "a red star"} for role in roles], VOCAB, TEXT.encode)


def test_request_and_caption_together_have_the_ids_of_the_sentence_they_make() -> None:
    for caption in tiny_model.sentences(50, seed=5):
        for request in chat.DRAW_REQUESTS:
            assert TEXT.encode(request) + TEXT.encode(caption) == TEXT.encode(f"{request} {caption}")


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> chat.ChatLoader:
    return chat.ChatLoader(config(tmp_path_factory), TEXT.encode)


def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tiny_model.token_shards(tmp_path_factory.mktemp("chat") / "shards")
    return DataConfig(shards=folder, row_len=256, draw_ratio=0.5)


def test_a_row_depends_on_its_number_alone(loader: chat.ChatLoader) -> None:
    again = chat.ChatLoader(loader.config, TEXT.encode)
    last = again.row(30)  # past the first epoch, and before the others were asked for
    assert again.plan_hash == loader.plan_hash
    for number in (30, 0, 7):
        one, other = loader.row(number), again.row(number) if number != 30 else last
        assert (one.tokens == other.tokens).all() and (one.loss_weight == other.loss_weight).all()
        assert one.keys == other.keys


def test_a_block_of_rows_holds_every_document_once_an_epoch(loader: chat.ChatLoader) -> None:
    block = loader._packed(0)
    keys = [(loader.loader.key(block[0][i]), block[0][i].epoch) for row in block[1] for i in row]
    assert len(keys) == len(set(keys)) == chat.BLOCK and {key for key, epoch in keys if epoch == 0} == {f"{i:06d}" for i in range(60)}


def test_rows_go_on_from_a_saved_state(loader: chat.ChatLoader) -> None:
    again, state = chat.ChatLoader(loader.config, TEXT.encode), loader.state(200)
    again.resume(state)
    for number in (200, 230, 3):
        assert again.row(number).keys == loader.row(number).keys
    with pytest.raises(ValueError, match="data order"):
        again.resume({**state, "plan_hash": "0"})


def test_rows_hold_drawing_describing_and_asking(loader: chat.ChatLoader) -> None:
    kinds = {"drawn": 0, "blank": 0, "described": 0, "asked": 0}
    described = [TEXT.encode(request) for request in chat.DESCRIBE_REQUESTS]
    for number in range(40):
        row = loader.row(number)
        for first, last in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            ids = row.tokens[first:last].tolist()
            if ids[:2] == [VOCAB.bos, VOCAB.boi]:
                kinds["blank"] += 1
            elif ids[:3] == [VOCAB.bos, VOCAB.user, VOCAB.boi]:
                asked = ids[ids.index(VOCAB.eoi) + 1:ids.index(VOCAB.assistant)]
                kinds["described" if asked in described else "asked"] += 1
            elif ids[0] == VOCAB.bos:
                kinds["drawn"] += 1
    assert min(kinds.values()) > 3 and kinds["blank"] < kinds["drawn"] / 3


def test_conversations_go_on_after_a_drawing_and_with_a_second_picture(loader: chat.ChatLoader) -> None:
    asked_after, two = 0, 0
    pairs, _ = loader._packed(0)
    for place in pairs[:60]:
        ids = loader.sequence(place, pairs).ids.tolist()
        asked_after += ids.count(VOCAB.boi) == 1 and ids[1:3] != [VOCAB.user, VOCAB.boi] and VOCAB.user in ids[ids.index(VOCAB.eoi):]
        two += ids.count(VOCAB.boi) == 2
        turns = [i for i in ids if i in (VOCAB.user, VOCAB.assistant)]
        assert turns == [VOCAB.user, VOCAB.assistant] * (len(turns) // 2)
    assert asked_after > 2 and two > 5
