"""Ids of an answer as they come → what can be shown of it: stretches of text, and pictures line by line.

Letters: M books, h w code grid.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.vocab import Vocab
from mmllm.generate.request import Reason
from tokenizer.text import TextTokenizer


@dataclass(frozen=True)
class Words:
    """Text that was not told before."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Line:
    """One line of codes of a picture that forms."""

    picture: int
    grid: tuple[int, int]
    number: int
    codes: NDArray[np.int32]
    """[M, h, w] of the picture so far; lines that are to come repeat this one."""

    @property
    def whole(self) -> bool:
        return self.number == self.grid[0] - 1


@dataclass(frozen=True)
class End:
    """Nothing follows."""

    reason: Reason
    text_tokens: int
    image_tokens: int


Event = Words | Line | End
UNFINISHED = "�"


class Transcript:
    """What one row says."""

    def __init__(self, vocab: Vocab, text: TextTokenizer, grid: tuple[int, int] | None = None) -> None:
        """grid: of the picture that the prompt has begun."""
        self.vocab, self.text = vocab, text
        self._picture = 0
        self._grid = grid
        self._inside = grid is not None
        self._ids, self._told = list[int](), ""
        self._text_tokens = self._image_tokens = self._counted = 0

    def take(self, token: int, reason: Reason) -> list[Event]:
        """One id more, and why it is the last if it is. → what it tells."""
        vocab, events, last = self.vocab, list[Event](), reason != ""
        inside = self._inside or token == vocab.boi
        self._image_tokens, self._text_tokens = self._image_tokens + inside, self._text_tokens + (not inside)
        if not inside:
            if token not in (vocab.eos, vocab.user):
                self._ids.append(token)
            events += self._words(last)
        elif token == vocab.boi:
            events += self._words(True)
            self._inside, self._grid, self._ids, self._told = True, None, [], ""
        elif token == vocab.eoi:
            self._inside, self._ids = False, []
            self._picture += 1
        elif self._grid is None:
            self._grid = vocab.grids[token - vocab.first_grid]
        else:
            self._ids.append(token)
            h, w = self._grid
            lines, rest = divmod(len(self._ids), w * vocab.num_books)
            if not rest:
                newest = self._ids[-w * vocab.num_books:]
                events.append(Line(self._picture, (h, w), lines - 1, vocab.codes(self._ids + newest * (h - lines), h, w)))
        if last:
            events.append(End(reason, self._text_tokens, self._image_tokens))
        return events

    def _words(self, all_of_them: bool) -> list[Event]:
        """Text that is certain: half a character waits for its other bytes."""
        said = self.text.decode(self._ids)
        if not all_of_them:
            said = said.rstrip(UNFINISHED)
        if len(said) <= len(self._told):
            return []
        new, self._told = said[len(self._told):], said
        tokens, self._counted = self._text_tokens - self._counted, self._text_tokens
        return [Words(new, tokens)]
