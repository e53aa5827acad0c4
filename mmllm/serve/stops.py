"""Words of the client's that end an answer."""

from collections.abc import AsyncIterator

from mmllm.serve.answer import events
from mmllm.serve.transcript import End, Line, Words
from mmllm.serve.worker import Ticket


class Stops:
    """Text up to the first of some words; what may be the beginning of one is held back."""

    def __init__(self, stop: str | list[str] | None) -> None:
        self.words = [word for word in ([stop] if isinstance(stop, str) else stop or []) if word]
        self.held, self.met = "", False

    def take(self, text: str, last: bool = False) -> str:
        """→ what may be told."""
        if self.met:
            return ""
        text, self.held = self.held + text, ""
        if (first := min((at for word in self.words if (at := text.find(word)) >= 0), default=-1)) >= 0:
            self.met = True
            return text[:first]
        keep = 0 if last else max((size for word in self.words for size in range(1, len(word)) if text.endswith(word[:size])), default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]


async def told(stop: str | list[str] | None, ticket: Ticket) -> AsyncIterator[tuple[int, Words | Line | End] | None]:
    """Events of the rows up to their stop words, until all have ended."""
    stops, running = [Stops(stop) for _ in range(ticket.count)], set(range(ticket.count))
    words, codes = [0] * ticket.count, [0] * ticket.count  # tokens so far
    async for event in events(ticket):
        if event is None:
            yield None
            continue
        row, what = event
        if row not in running:
            continue
        over = isinstance(what, End)
        if isinstance(what, Words):
            words[row] += what.tokens
            if text := stops[row].take(what.text):
                yield row, Words(text, what.tokens)
        elif text := stops[row].take("", last=True):  # a picture or the end: no stop word goes on
            yield row, Words(text, 0)
        if isinstance(what, Line):
            codes[row] += what.codes.size // what.grid[0]
            yield row, what
        if over or stops[row].met:
            running.discard(row)
            yield row, what if isinstance(what, End) else End("stop", words[row], codes[row])
        if not running:
            return
