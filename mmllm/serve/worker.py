"""The one thread that owns the model's steps, and the line before it.

Requests come from the event loop, their events go back to it. Rows wait in start-time fair order (Goyal et al. 1996, "Start-time fair
queueing", section 2): a client's rows are tagged one behind the other, so that who asks for much waits behind who asks for little, and
nobody for ever. Whose client hangs up leaves the line or the batch before the next step.
"""

import asyncio
import heapq
import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from mmllm.generate.engine import Engine
from mmllm.generate.request import Request
from mmllm.serve.metrics import Metrics
from mmllm.serve.refusal import Refusal
from mmllm.serve.settings import Settings
from mmllm.serve.transcript import End, Event, Transcript

log = logging.getLogger("mmllm.serve")
JOINS = 8
"""Rows that join between two steps at most: those that run wait while prompts are read."""

class Ticket:
    """One request's rows: a place in line from the start, events as they come, and gone when it is left."""

    def __init__(self, worker: "Worker", count: int, client: str) -> None:
        self.count, self.client, self.cancelled = count, client, False
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._events = asyncio.Queue[tuple[int, Event] | Refusal]()
        self.waiting = count
        """Rows that have no place in the batch yet."""

    def start(self, requests: Sequence[Request], grid: tuple[int, int] | None = None) -> None:
        """Ask for the rows. grid: of the picture that their prompts have begun."""
        assert len(requests) == self.count
        self._worker.enqueue(self, requests, grid)

    async def next(self) -> tuple[int, Event]:
        """(which row, what it tells). Errors: Refusal where the server could not."""
        found = await self._events.get()
        if isinstance(found, Refusal):
            raise found
        return found

    def tell(self, events: Sequence[tuple[int, Event] | Refusal]) -> None:
        """From any thread."""
        def put() -> None:
            for event in events:
                self._events.put_nowait(event)
        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancelled = True

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.drop(self)


class _Place:
    """A row in line, then in the batch."""

    def __init__(self, ticket: Ticket, number: int, request: Request, transcript: Transcript) -> None:
        self.ticket, self.number, self.request, self.transcript = ticket, number, request, transcript
        self.since = time.monotonic()


class Worker:
    """Decodes for everybody."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.stopping = False
        self._batch = engine.batching(2 * settings.rows)  # those that are guided take two
        self._running = dict[int, _Place]()  # by what the batch calls them
        self._line = list[tuple[float, int, _Place]]()
        self._tickets = set[Ticket]()
        self._arrivals, self._now = 0, 0.0
        self._tags = dict[str, float]()
        self._pace_s = 1.0  # between rows that end, lately
        self._ended = time.monotonic()
        self._changed = threading.Condition()
        self._closed = False
        metrics.gauges |= {
            "mmllm_rows_running": ("Rows in the batch", lambda: len(self._running)),
            "mmllm_rows_waiting": ("Rows in line", self.waiting),
            "mmllm_cache_bytes": ("Keys and values of the batch", lambda: self.held_bytes),
            "mmllm_stopping": ("1 while the server ends", lambda: self.stopping),
        }
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    # From the event loop ----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def held_bytes(self) -> int:
        """Keys and values of the batch."""
        return self._batch.cache.nbytes

    def waiting(self) -> int:
        return sum(ticket.waiting for ticket in tuple(self._tickets))

    def admit(self, count: int, client: str) -> Ticket:
        """A place in line for so many rows. Errors: Refusal while stopping, or where the line is full."""
        if self.stopping:
            raise Refusal(503, "the server is stopping", code="stopping", retry_s=10)
        if self.waiting() + count > self.settings.queue:
            retry_s = min(60, 1 + int(self.waiting() * self._pace_s))
            raise Refusal(429, f"{self.waiting()} rows wait already and {self.settings.queue} may: come again in {retry_s} s",
                          code="queue_full", retry_s=retry_s)
        ticket = Ticket(self, count, client)
        self._tickets.add(ticket)
        return ticket

    def enqueue(self, ticket: Ticket, requests: Sequence[Request], grid: tuple[int, int] | None) -> None:
        folder = self.engine.folder
        with self._changed:
            for number, request in enumerate(requests):
                tag = max(self._now, self._tags.get(ticket.client, 0.0))
                self._tags[ticket.client] = tag + request.plan.most(self.engine.grammar.longest)
                self._arrivals += 1
                place = _Place(ticket, number, request, Transcript(folder.vocab, folder.text, grid))
                heapq.heappush(self._line, (tag, self._arrivals, place))
            self._changed.notify()

    def drop(self, ticket: Ticket) -> None:
        """Nobody waits for this any more."""
        with self._changed:
            ticket.cancelled, ticket.waiting = True, 0
            self._tickets.discard(ticket)
            self._changed.notify()

    # Stopping ---------------------------------------------------------------------------------------------------------

    def stop(self, within_s: float) -> None:
        """Take nothing new, let what was taken end, and refuse what has not ended by then. Blocks."""
        self.stopping = True
        end = time.monotonic() + within_s
        while self._tickets and time.monotonic() < end:
            time.sleep(0.02)
        for ticket in tuple(self._tickets):
            ticket.tell([Refusal(503, "the server is stopping and this took too long", code="stopping", retry_s=10)])
            self.drop(ticket)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(max(1.0, end - time.monotonic()))

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._line or self._running)
                if self._closed:
                    return
                joining = self._next_in_line()
            try:
                for name, place in tuple(self._running.items()):
                    if place.ticket.cancelled:
                        self._batch.cancel(name)
                        del self._running[name]
                for place in joining:
                    self._join(place)
                if not self._batch.idle:  # those that were cancelled leave with a step as well
                    self._step()
            except Exception:  # memory, mostly: everybody in the batch is told, the next are served
                log.exception("a step failed")
                failed = {place.ticket for place in (*self._running.values(), *joining)}
                self._batch, self._running = self.engine.batching(2 * self.settings.rows), {}
                for ticket in failed:
                    ticket.tell([Refusal(500, "the server failed at this request; its log says why")])
                    self.drop(ticket)

    def _join(self, place: _Place) -> None:
        try:
            self._running[self._batch.submit(place.request)] = place
        except ValueError as error:
            place.ticket.tell([Refusal(400, str(error))])
            return
        self.metrics.took("mmllm_wait_seconds", time.monotonic() - place.since)
        self.metrics.add("mmllm_tokens_total", len(place.request.prompt), kind="read")

    def _next_in_line(self) -> list[_Place]:
        joining = list[_Place]()
        free = min(JOINS, self.settings.rows - sum(not place.ticket.cancelled for place in self._running.values()))
        while self._line and len(joining) < free:
            self._now, _, place = heapq.heappop(self._line)
            if not place.ticket.cancelled:
                place.ticket.waiting -= 1
                joining.append(place)
        if not self._line:
            self._tags.clear()
            self._now = 0.0
        return joining

    def _step(self) -> None:
        told = dict[Ticket, list[tuple[int, Event] | Refusal]]()
        for found in self._batch.step():
            if found.ticket not in self._running:  # cancelled
                continue
            place = self._running.pop(found.ticket) if found.last else self._running[found.ticket]
            events = place.transcript.take(found.id, found.reason)
            if events:
                told.setdefault(place.ticket, []).extend((place.number, event) for event in events)
            for event in events:
                if isinstance(event, End):
                    self.metrics.add("mmllm_tokens_total", event.text_tokens, kind="text")
                    self.metrics.add("mmllm_tokens_total", event.image_tokens, kind="image")
            if found.last:
                now = time.monotonic()
                self._pace_s += 0.1 * (min(now - self._ended, 10.0) - self._pace_s)
                self._ended = now
        for ticket, events in told.items():
            ticket.tell(events)
