"""Tuning on conversations that lie in shards: what they become, what stock classes make of them, and mixtures."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sft_world
import tiny_model
from sft_world import KINDS, codes, documents, recipe, talk

from data import chat
from data.chat import ChatLoader
from data.config import DataConfig
from data.document import Document
from data.loader import Loader, Row
from data.mixture import Source, Stage
from mmllm import hf
from mmllm.runs.sft import conversations
from mmllm.runs.sft_loss import document_groups

VOCAB, TEXT = tiny_model.vocabulary(), tiny_model.text_tokenizer()
world = sft_world.world


@pytest.fixture(scope="module")
def folder(world: Path) -> hf.Folder:
    return hf.open_folder(world / "model")


def messages(document: Document, pictures: Iterator[Any]) -> list[dict[str, Any]]:
    """A conversation as stock templates take it."""
    parts = [(role, {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "codes": next(pictures)})
             for role, part in zip(document.roles, document.parts, strict=True)]
    return [{"role": role, "content": [part for _, part in turn]} for role, turn in groupby(parts, lambda part: part[0])]


def all_messages(kind: str) -> dict[str, list[dict[str, Any]]]:
    pictures = iter([codes(kind, number).tolist() for number in range(100)])
    return {document.key: messages(document, pictures) for document in documents(kind, 24)}


def in_row(row: Row) -> Iterator[tuple[str, list[int], list[int]]]:
    """Key, ids, and ids that are learned of each document."""
    for key, a, b in zip(row.keys, row.cu_seqlens, row.cu_seqlens[1:], strict=False):
        ids, labels = row.tokens[a:b], row.labels[a:b]
        yield key, ids.tolist(), labels[row.loss_weight[a:b] > 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_of_a_shard_is_the_one_that_is_said(world: Path, folder: hf.Folder, kind: str) -> None:
    said, rows = all_messages(kind), conversations(recipe(world, world), folder, talk(world, kind))
    assert isinstance(rows, Loader)
    seen = set[str]()
    for number in range(30):
        for key, ids, learned in in_row(rows.row(number)):
            expected = chat.conversation(said[key], VOCAB, TEXT.encode)
            assert ids == expected.ids.tolist() and learned == expected.ids[expected.loss_weight > 0].tolist()
            seen.add(key)
    assert len(seen) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_template_of_the_folder_writes_the_ids_that_are_trained_on(world: Path, kind: str) -> None:
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    for said in all_messages(kind).values():
        whole = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
        assert whole == chat.conversation(said, VOCAB, TEXT.encode).ids.tolist()
        asked = tokenizer.apply_chat_template(said[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert asked == chat.prompt(said[:-1], VOCAB, TEXT.encode) == whole[:len(asked)]


def test_texts_side_by_side_in_a_turn_are_two_texts_to_the_template_too(world: Path) -> None:
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    shown = {"type": "image", "codes": codes("mixed", 0).tolist()}
    for parts in (["a red star", "how many?"], ["a", shown, "red", "star"], ["a", ""], [shown, "a", "red", "star", shown]):
        turn = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
        said = [{"role": "user", "content": turn}, {"role": "assistant", "content": "two."}]
        theirs = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
        assert theirs == chat.conversation(said, VOCAB, TEXT.encode).ids.tolist()


def test_pairs_become_conversations_unless_they_are_to_stay_as_they_are(world: Path, folder: hf.Folder) -> None:
    settings = recipe(world, world)
    assert isinstance(conversations(settings, folder, settings.data), ChatLoader)
    assert isinstance(conversations(replace(settings, conversations="as they are"), folder, settings.data), Loader)
    with pytest.raises(ValueError, match="no picture with a text: conversations are made from pairs only"):
        conversations(replace(settings, conversations="from pairs"), folder, talk(world)).row(0)


def mixture(world: Path) -> DataConfig:
    """Understanding alone, then all kinds with the pairs of pretraining among them."""
    sources = tuple(Source(shards=world / "talk", prefix=kind) for kind in KINDS)
    later = Stage(sources=(*sources, Source(shards=world / "shards")), from_step=4, weigh="samples")
    return DataConfig(stages=(Stage(sources=sources[:1]), later), row_len=192, block_len=32)


def test_kinds_of_conversations_are_mixed_by_stages(world: Path, folder: hf.Folder) -> None:
    rows = conversations(recipe(world, world), folder, mixture(world))
    kinds = [[key.rpartition("-")[0] or "pair" for key in rows.row(number).keys] for number in range(60)]
    assert {kind for row in kinds[:16] for kind in row} == {"understanding"}
    later = [kind for row in kinds[30:] for kind in row]
    assert set(later) == {*KINDS, "pair"} and min(map(later.count, set(later))) > 0.7 * len(later) / 5


def test_grouped_conversations_hold_every_trained_token_once(world: Path, folder: hf.Folder) -> None:
    rows = [conversations(recipe(world, world), folder, mixture(world)).row(number) for number in range(30, 36)]
    trained = sorted(label for row in rows for _, _, learned in in_row(row) for label in learned)
    grouped = [group.labels[group.weight > 0].tolist() for group in document_groups(rows)]
    assert sorted(label for labels in grouped for label in labels) == trained


def test_held_out_rows_are_those_of_other_shards(world: Path, folder: hf.Folder) -> None:
    settings = recipe(world, world, data=talk(world), validate_every=2)
    held = conversations(settings, folder, settings.held_out)
    assert settings.held_out == talk(world, "val") and len(held.row(0).keys) > 1
    mixed = replace(settings, data=mixture(world)).held_out
    assert len(mixed.stages) == 1 and {source.prefix for source in mixed.stages[0].sources} == {"val"}
    assert np.isfinite(held.row(0).loss_weight).all()
