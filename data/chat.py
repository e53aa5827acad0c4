"""Conversations → sequences that train on the assistant alone.

    <bos> (<user> text and pictures <assistant> text and pictures)* <eos>

The user's turn is read, never learned. What the assistant says is learned, with the token that ends its turn: the next
`<user>`, or `<eos>`. The grid of a picture is the asker's to give, so the grid token is never learned.

A *turn* is `{"role": "user" | "assistant", "content": parts}`, a part `{"type": "text", "text": str}` or
`{"type": "image", "codes": [M, h, w]}`; a plain string may stand for one text.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.document import CAPTION, IMAGE, QUESTION, TEXT, TokenDocument, TokenSequence, uniform
from data.loader import DataConfig, Loader, Row, assemble
from data.packing import pack
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
    for number, (role, parts) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise ValueError(f"turn {number} is {role!r}: turns alternate and the user begins")
        learned = role == "assistant"
        ids.append(vocab.assistant if learned else vocab.user)
        weights.append(float(not learned and number > 0))  # this <user> ends the assistant's turn
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
    conversations a second picture follows."""

    def __init__(self, config: DataConfig, encode: Encode, fingerprint: str | None = None) -> None:
        self.config, self.loader = config, Loader(config, fingerprint)
        self.vocab, self.row_len = self.loader.vocab, config.row_len
        name = f"chat 2 {self.loader.plan_hash} {DRAW_REQUESTS} {DESCRIBE_REQUESTS}"
        self.plan_hash = hashlib.sha256(name.encode()).hexdigest()[:16]
        self._draw, self._describe = [encode(r) for r in DRAW_REQUESTS], [encode(r) for r in DESCRIBE_REQUESTS]
        table = self.loader.table
        self._keys, self._pairs = table.keys, np.flatnonzero(table.is_pair)
        if not len(self._pairs):
            raise ValueError(f"{config.shards} holds no picture with a text: conversations are made from pairs only")
        self._rows: list[list[tuple[int, int]]] = []  # (document, epoch) of each row packed so far
        self._blocks = 0

    def row(self, number: int) -> Row:
        """Row `number`, 0 …, of the endless list."""
        while number >= len(self._rows):
            self._pack_block()
        members = self._rows[number]
        keys = tuple(str(self._keys[document]) for document, _ in members)
        return assemble([self.sequence(*member) for member in members], keys, self.row_len, self.vocab.pad)

    def _pack_block(self) -> None:
        """The next block of documents becomes rows: only as much is planned as is trained on."""
        blocks = -(-len(self._pairs) // BLOCK)
        epoch, block = divmod(self._blocks, blocks)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(self._pairs)
        documents = [int(i) for i in order[block * BLOCK:(block + 1) * BLOCK]]
        lengths = [len(self.sequence(document, epoch).ids) for document in documents]
        self._rows += [[(documents[i], epoch) for i in row] for row in pack(lengths, self.row_len, self.config.window)]
        self._blocks += 1

    def sequence(self, number: int, epoch: int) -> TokenSequence:
        """Document `number` as a conversation in `epoch`."""
        doc, chance = self.loader.document(number), self._chances(number, epoch)
        if chance(SALT_TASK) < self.config.draw_ratio and chance(SALT_DROP) < self.config.drop_text:
            return blank(doc, self.vocab)
        exchanges = self._exchanges(number, epoch)
        alone = self._join(exchanges)
        if chance(SALT_MORE) < MORE:
            partner = int(self._pairs[int(chance(SALT_PARTNER) * len(self._pairs))])
            both = self._join(exchanges + self._exchanges(partner, epoch))
            if len(both.ids) <= self.row_len:
                return both
        return alone

    def _exchanges(self, number: int, epoch: int) -> list[Exchange]:
        """What is said about one document."""
        doc, chance = self.loader.document(number), self._chances(number, epoch)
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

    def _chances(self, number: int, epoch: int) -> Callable[[int], float]:
        """A document's choices in an epoch: salt → a number in [0, 1)."""
        key = self.loader.table.key_hash[number:number + 1]
        return lambda salt: float(uniform(self.config.seed, key, epoch, salt)[0])


def _pick(choices: list[list[int]], u: float) -> list[int]:
    return choices[int(u * len(choices))]
