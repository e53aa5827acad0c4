"""Conversations → sequences that train on the assistant alone.

    <bos> (<system> text)? (<user> text and pictures <assistant> text and pictures)* <eos>

The user's turn is read, never learned. What the assistant says is learned, with the token that ends its turn: the next
`<user>`, or `<eos>`. The grid of a picture is the asker's to give, so the grid token is never learned.

A *turn* is `{"role": "system" | "user" | "assistant", "content": parts}`, a part `{"type": "text", "text": str}` or
`{"type": "image", "codes": [M, h, w]}`; a plain string may stand for one text.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chance import uniform
from data.config import DataConfig
from data.document import CAPTION, IMAGE, QUESTION, TEXT, TokenDocument
from data.loader import Loader, Row, assemble
from data.packing import pack
from data.plan import Place
from data.sequence import TokenSequence
from data.vocab import Vocab

Encode = Callable[[str], list[int]]
Turn = Mapping[str, Any]
Exchange = tuple[list[list[int]], list[list[int]]]
"""Parts of ids that the user says, and those of the assistant's reply."""

DRAW_REQUESTS = ("draw", "please draw", "draw a picture of")
DESCRIBE_REQUESTS = ("describe the picture", "what do you see?", "what is in the picture?")
SALT_TASK, SALT_TEXT, SALT_REQUEST, SALT_DROP, SALT_COUNT, SALT_MORE, SALT_PARTNER, SALT_ORDER = range(100, 108)
MORE = 0.3
BLOCK = 512  # documents packed together


def conversation(turns: Sequence[Turn], vocab: Vocab, encode: Encode) -> TokenSequence:
    """A whole conversation, which ends in an assistant's turn."""
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("a conversation to train on ends in an assistant's turn")
    return _sequence([(turn["role"], _parts(turn, vocab, encode)) for turn in turns], vocab)


def prompt(turns: Sequence[Turn], vocab: Vocab, encode: Encode) -> list[int]:
    """Ids up to where the assistant begins to speak."""
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("a prompt ends in a user's turn")
    said = [(turn["role"], _parts(turn, vocab, encode)) for turn in turns]
    whole = _sequence([*said, ("assistant", [])], vocab)
    return whole.ids[:-1].tolist()  # without <eos>


def image(ids: Sequence[int] | NDArray[np.int32], grid: tuple[int, int], vocab: Vocab) -> list[int]:
    """Code ids of a picture with its frame."""
    return [vocab.boi, vocab.grid(*grid), *map(int, ids), vocab.eoi]


def _parts(turn: Turn, vocab: Vocab, encode: Encode) -> Sequence[list[int]]:
    content = turn["content"]
    parts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            parts.append(encode(part["text"]))
        elif part["type"] == "image":
            codes = np.asarray(part["codes"])
            parts.append(image(vocab.image_ids(codes).tolist(), (codes.shape[1], codes.shape[2]), vocab))
        else:
            raise ValueError(f"a part of a turn has type {part['type']!r}; text and image are known")
    return parts


def _sequence(turns: Sequence[tuple[str, Sequence[Sequence[int]]]], vocab: Vocab) -> TokenSequence:
    """Turns of parts of ids, alternating from the user → ids and weights."""
    ids, weights = [vocab.bos], [0.0]
    names = {"system": vocab.system, "user": vocab.user, "assistant": vocab.assistant}
    expected, spoke = ("system", "user"), ""
    for number, (role, parts) in enumerate(turns):
        if role not in expected:
            raise ValueError(f"turn {number} is {role!r}: user and assistant alternate, the user begins, behind the system at most")
        learned = role == "assistant"
        ids.append(names[role])
        weights.append(float(spoke == "assistant"))  # this <user> ends the assistant's turn
        expected, spoke = ("assistant",) if role == "user" else ("user",), role
        for part in parts:
            ids += part
            weights += [float(learned)] * len(part)
            if part and part[0] == vocab.boi:
                weights[1 - len(part)] = 0.0  # the grid
    return TokenSequence(np.array([*ids, vocab.eos], np.int64), np.array([*weights, 1.0], np.float32))


# From the pairs of pretraining ------------------------------------------------------------------------------------

def blank(doc: TokenDocument, vocab: Vocab) -> TokenSequence:
    """The picture with all text dropped, for guidance."""
    picture = doc.kinds.index(IMAGE)
    ids = [vocab.bos, *image(doc.part(picture), doc.grids[picture], vocab), vocab.eos]
    return TokenSequence(np.array(ids, np.int64), np.array([0, 0, 0, *[1] * (len(ids) - 3)], np.float32))


def drawing(doc: TokenDocument, caption: int, request: list[int], vocab: Vocab) -> list[Exchange]:
    """"draw …" and the picture. `caption` is the number of a part."""
    picture = doc.kinds.index(IMAGE)
    return [([request, doc.part(caption).tolist()], [image(doc.part(picture), doc.grids[picture], vocab)])]


def asking(doc: TokenDocument, described: list[int] | None, order: Sequence[int], shown: bool, vocab: Vocab) -> list[Exchange]:
    """Talk about the picture: the request `described` with the description, then questions in `order` (numbers 0 …). The
    user shows the picture first, unless it has been `shown`."""
    questions = [number for number, kind in enumerate(doc.kinds) if kind == QUESTION]
    said = [] if described is None else [(described, doc.part(doc.kinds.index(TEXT)).tolist())]
    said += [(doc.part(questions[n]).tolist(), doc.part(questions[n] + 1).tolist()) for n in order]
    exchanges: list[Exchange] = [([asked], [answered]) for asked, answered in said]
    if exchanges and not shown:
        picture = doc.kinds.index(IMAGE)
        exchanges[0][0].insert(0, image(doc.part(picture), doc.grids[picture], vocab))
    return exchanges


class ChatLoader:
    """Rows of conversations made from token shards of pairs; as `data.loader.Loader`, a pure function of the number.

    A picture is drawn and sometimes asked about, or shown and described or asked about at once; in a share `MORE` of the
    conversations a second picture of the block follows."""

    def __init__(self, config: DataConfig, encode: Encode, fingerprint: str | None = None) -> None:
        self.config, self.loader = config, Loader(config, fingerprint)
        self.vocab, self.row_len = self.loader.vocab, config.row_len
        if len(self.loader.plan.names) > 1:
            raise ValueError(f"data.stages has {len(self.loader.plan.names)} sources: conversations are made from the pairs of one")
        self._draw, self._describe = [encode(r) for r in DRAW_REQUESTS], [encode(r) for r in DESCRIBE_REQUESTS]
        self._first_rows = [0]  # of each block that is known, and of the next
        self._known = 0  # number of the first
        self._block = lru_cache(2)(self._packed)

    @property
    def plan_hash(self) -> str:
        name = f"chat 3 {self.loader.plan.hash()} {DRAW_REQUESTS} {DESCRIBE_REQUESTS}"
        return hashlib.sha256(name.encode()).hexdigest()[:16]

    def row(self, number: int) -> Row:
        """Row `number`, 0 …, of the endless list."""
        places, rows = self._block(self._at(number))
        members = rows[number - self._first_rows[self._at(number) - self._known]]
        sequences = [self.sequence(places[i], places) for i in members]
        return assemble(sequences, tuple(self.loader.key(places[i]) for i in members), self.row_len, self.vocab.pad)

    def state(self, consumed_rows: int) -> dict[str, Any]:
        block = self._at(max(consumed_rows - 1, 0))
        return {"plan_hash": self.plan_hash, "consumed_rows": consumed_rows, "block": block,
                "first_row": self._first_rows[block - self._known]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Errors: ValueError where the rows that were consumed would be others now."""
        if state["plan_hash"] != self.plan_hash:
            raise ValueError(f"data order (plan {state['plan_hash']} then, {self.plan_hash} now)")
        self._known, self._first_rows = state["block"], [state["first_row"]]

    def _at(self, row: int) -> int:
        """Number of the block that holds a row."""
        if row < self._first_rows[0]:
            self._known, self._first_rows = 0, [0]
        barren = 0
        while row >= self._first_rows[-1]:
            _, rows = self._block(self._known + len(self._first_rows) - 1)
            self._first_rows.append(self._first_rows[-1] + len(rows))
            barren = 0 if rows else barren + 1
            if barren * BLOCK > self.loader.plan.orders[0].size:
                raise ValueError(f"{self.config.shards} holds no picture with a text: conversations are made from pairs only")
        return self._known + bisect_right(self._first_rows, row) - 1

    def _packed(self, block: int) -> tuple[list[Place], list[list[int]]]:
        """The pairs among the next documents, and which of them are in each row: only as much is planned as is trained on."""
        plan = self.loader.plan
        places = [Place(0, epoch, group, number) for epoch, group, numbers in plan.orders[0].places(block * BLOCK, (block + 1) * BLOCK)
                  for number in numbers[plan.table(0, epoch, group).is_pair[numbers]].tolist()]
        lengths = [len(self.sequence(place, places).ids) for place in places]
        return places, pack(lengths, self.row_len, self.config.window)

    def sequence(self, place: Place, others: list[Place]) -> TokenSequence:
        """A document as a conversation, in which one of the others may follow."""
        doc, chance = self.loader.documents([place])[0], self._chances(place)
        if chance(SALT_TASK) < self.config.draw_ratio and chance(SALT_DROP) < self.config.drop_text:
            return blank(doc, self.vocab)
        exchanges = self._exchanges(place)
        alone = self._join(exchanges)
        if chance(SALT_MORE) < MORE:
            both = self._join(exchanges + self._exchanges(others[int(chance(SALT_PARTNER) * len(others))]))
            if len(both.ids) <= self.row_len:
                return both
        return alone

    def _exchanges(self, place: Place) -> list[Exchange]:
        """What is said about one document."""
        doc, chance = self.loader.documents([place])[0], self._chances(place)
        order = np.argsort([chance(SALT_ORDER + i) for i in range(doc.kinds.count(QUESTION))]).tolist()
        if chance(SALT_TASK) < self.config.draw_ratio:
            captions = [i for i, kind in enumerate(doc.kinds) if kind in (TEXT, CAPTION)]
            caption = captions[int(chance(SALT_TEXT) * len(captions))]
            drawn = drawing(doc, caption, _pick(self._draw, chance(SALT_REQUEST)), self.vocab)
            then = order[:2] if chance(SALT_COUNT) < MORE else []
            return drawn + asking(doc, None, then, True, self.vocab)
        first = chance(SALT_COUNT) < 0.5 or not order
        request = _pick(self._describe, chance(SALT_REQUEST)) if first else None
        return asking(doc, request, order, False, self.vocab)

    def _join(self, exchanges: list[Exchange]) -> TokenSequence:
        turns = [turn for asked, answered in exchanges for turn in (("user", asked), ("assistant", answered))]
        return _sequence(turns, self.vocab)

    def _chances(self, place: Place) -> Callable[[int], float]:
        """A document's choices in an epoch: salt → a number in [0, 1)."""
        key = self.loader.plan.table(*place[:3]).key_hash[place.number:place.number + 1]
        return lambda salt: float(uniform(self.config.seed, key, place.epoch, salt)[0])


def _pick(choices: list[list[int]], u: float) -> list[int]:
    return choices[int(u * len(choices))]
