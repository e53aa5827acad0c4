"""Something to be continued, and how far it is: what it said, where in the grammar it stands, why it ended."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmllm.generate.grammar import DONE, GRID, TEXT, Grammar
from mmllm.generate.plan import Plan

Reason = Literal["", "stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Something to be continued."""

    prompt: Sequence[int]
    key: int
    """Of its random numbers."""
    plan: Plan
    blank: Sequence[int] = ()
    """What guidance's second row reads before a picture; `<bos>` alone if empty."""


class Event(NamedTuple):
    """One id more of a request."""

    ticket: int
    id: int
    last: bool
    reason: Reason
    """Why it is the last: the model stopped (or the picture is whole), or a budget is spent."""


@dataclass
class Running:
    """A request and how far it is."""

    ticket: int
    request: Request
    state: int
    need: int
    """Columns to plan for."""
    random: NDArray[np.float32]
    deadline: float
    new: list[int] = field(default_factory=list)
    written: int = 0
    """Text tokens."""
    pictures: int = 0
    row: int = -1
    blank: int = -1
    """Rows of the cache; no blank one without guidance."""
    blank_len: int = 0
    """Tokens the blank row waits behind."""
    reason: Reason = ""

    @property
    def in_picture(self) -> bool:
        return self.state > DONE

    @property
    def begins(self) -> bool:
        """May begin a picture now."""
        return self.pictures < self.request.plan.max_pictures and time.monotonic() < self.deadline

    def advance(self, token: int, grammar: Grammar) -> None:
        """One more id, and whether it was the last."""
        vocab, plan, before = grammar.vocab, self.request.plan, self.state
        first, _, after, begin = grammar.on_host
        self.new.append(token)
        if before == TEXT:
            self.written += 1
            self.pictures += token == vocab.boi
            self.state = GRID if token == vocab.boi else DONE if vocab.text_size <= token else TEXT
        elif before == GRID:
            self.state = begin[token - vocab.first_grid]
        else:
            self.state = after[before]
        if self.state == DONE:
            self.reason = "stop"
        elif plan.only_picture:
            self.reason = "stop" if first[self.state] == vocab.eoi else ""
        elif self.state == TEXT and (self.written >= plan.max_text or time.monotonic() >= self.deadline):
            self.reason = "length"
