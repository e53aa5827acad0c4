"""What each document is trained as in an epoch, and how many tokens that takes: from the index alone, for many documents at once.

Every choice (draw or describe, which caption, whether it is dropped, what comes first) is a hash of seed, key and epoch.

Letters: n documents, p parts of all of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.chance import uniform
from data.config import DataConfig
from data.document import ANSWER, CAPTION, IMAGE, QUESTION, ROLE, TEXT
from data.index import Index
from data.sequence import CHAT, DESCRIBE, DRAW, FRAME, INTERLEAVED

SALT_TASK, SALT_CAPTION, SALT_DROP, SALT_FIRST, SALT_QUESTION = range(5)  # and on, a question each


@dataclass(frozen=True)
class Table:
    """Indexes of some shards joined: where documents lie, and what choosing needs to know of them."""

    keys: NDArray[np.bytes_]
    shard: NDArray[np.int32]
    """[n] number of the shard among those joined"""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    key_hash: NDArray[np.uint64]
    first_part: NDArray[np.int64]
    """[n + 1]"""
    kinds: NDArray[np.int8]
    lengths: NDArray[np.int32]
    """[p] ids of each part, as of `kinds`"""
    is_pair: NDArray[np.bool_]
    """[n] one picture with a text: may be drawn or described. Everything else is read in order, or is a conversation."""
    turns: NDArray[np.int64]
    """[n] of a conversation; 0 for other documents"""
    pictures: NDArray[np.int64]
    """[n] ids of pictures with their frames"""
    said: NDArray[np.int64]
    """[n] ids of texts"""
    asked: NDArray[np.int64]
    """[n] ids of questions and answers, with what stands before each"""
    questions: NDArray[np.int64]
    """[n] how many"""
    first_prompt: NDArray[np.int64]
    """[n + 1] where a document's texts and captions begin in `prompts`"""
    prompts: NDArray[np.int64]
    """parts, of all of them, that a picture may be drawn from"""

    @classmethod
    def join(cls, indexes: list[Index]) -> "Table":
        starts = np.cumsum([0] + [len(index.kinds) for index in indexes])
        first_part = np.concatenate([index.first_part[:-1] + start for index, start in zip(indexes, starts, strict=False)] + [starts[-1:]])
        kinds = np.concatenate([index.kinds for index in indexes])
        lengths = np.concatenate([index.lengths for index in indexes])
        roles, plain = np.divmod(kinds, ROLE)

        def total(which: NDArray[np.bool_], per_part: NDArray[np.integer] | int) -> NDArray[np.int64]:
            """Of each document, over the parts that are `which`."""
            return np.add.reduceat(np.where(which, per_part, 0).astype(np.int64), first_part[:-1]) if len(kinds) else np.zeros(0, np.int64)

        begins = (roles > 0) & (roles != np.concatenate([[0], roles[:-1]]))
        begins[first_part[:-1]] = roles[first_part[:-1]] > 0
        is_prompt = (plain == TEXT) | (plain == CAPTION)
        turns = total(begins, 1)
        return cls(keys=np.concatenate([index.keys for index in indexes]),
                   shard=np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.keys) for index in indexes]),
                   offsets=np.concatenate([index.offsets for index in indexes]), sizes=np.concatenate([index.sizes for index in indexes]),
                   key_hash=np.concatenate([index.key_hash for index in indexes]), first_part=first_part, kinds=kinds, lengths=lengths,
                   is_pair=(total(plain == IMAGE, 1) == 1) & (total(plain == TEXT, 1) == 1) & (turns == 0), turns=turns,
                   pictures=total(plain == IMAGE, lengths + FRAME), said=total(plain == TEXT, lengths),
                   asked=total((plain == QUESTION) | (plain == ANSWER), lengths + 1), questions=total(plain == QUESTION, 1),
                   first_prompt=np.concatenate([[0], np.cumsum(total(is_prompt, 1))]), prompts=np.flatnonzero(is_prompt))


class Choice(NamedTuple):
    """What one document is trained as."""

    task: int
    prompt: int
    """number of the part that a picture is drawn from; −1 where it is dropped or not drawn"""
    text_first: bool


class Choices(NamedTuple):
    """Of each document [n]."""

    task: NDArray[np.int8]
    prompt: NDArray[np.int64]
    text_first: NDArray[np.bool_]
    length: NDArray[np.int64]
    """tokens of the sequence"""


def choose(table: Table, rows: NDArray[np.int64], epoch: int, config: DataConfig) -> Choices:
    """What documents `rows` [n] of a table are in an epoch."""
    keys, seed = table.key_hash[rows], config.seed
    is_pair, turns, questions = table.is_pair[rows], table.turns[rows], table.questions[rows]
    if not is_pair.any():
        task = np.where(turns > 0, CHAT, INTERLEAVED).astype(np.int8)
        return Choices(task, np.full(len(rows), -1), np.ones(len(rows), np.bool_), 2 + table.pictures[rows] + table.said[rows] + turns)
    drawn = is_pair & (uniform(seed, keys, epoch, SALT_TASK) < config.draw_ratio)
    prompted = drawn & (uniform(seed, keys, epoch, SALT_DROP) >= config.drop_text)
    first, end = table.first_prompt[rows], table.first_prompt[rows + 1]
    chosen = first + (uniform(seed, keys, epoch, SALT_CAPTION) * (end - first)).astype(np.int64)
    part = table.prompts[np.minimum(chosen, len(table.prompts) - 1)] if len(table.prompts) else np.zeros(len(rows), np.int64)
    text_first = (questions == 0) | (uniform(seed, keys, epoch, SALT_FIRST) < config.describe_first)
    task = np.select([turns > 0, drawn, is_pair], [CHAT, DRAW, DESCRIBE], INTERLEAVED).astype(np.int8)
    spoken = np.select([drawn, is_pair], [np.where(prompted, table.lengths[part] if len(table.lengths) else 0, 0),
                                          table.said[rows] + table.asked[rows] + 2 * ~text_first], table.said[rows] + turns)
    return Choices(task, np.where(prompted, part - table.first_part[rows], -1), text_first, 2 + table.pictures[rows] + spoken)


def question_order(seed: int, key_hash: np.uint64, epoch: int, count: int) -> list[int]:
    """In which order a document's questions are asked."""
    key = np.full(1, key_hash)
    return np.argsort([uniform(seed, key, epoch, SALT_QUESTION + i)[0] for i in range(count)]).tolist()
