"""Ways to answer that every route shares: unless the client has gone, and as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mmllm.serve.metrics import Metrics
from mmllm.serve.refusal import Refusal
from mmllm.serve.transcript import Event
from mmllm.serve.worker import Ticket

T = TypeVar("T")
SILENCE_S = 10.0
"""A comment is sent after so long without an event: proxies cut what is silent."""


async def unless_gone(request: Request, metrics: Metrics, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled when the client hangs up."""
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        metrics.add("mmllm_hung_up_total")
        raise Refusal(499, "the client has gone")
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def sse(data: dict[str, Any] | str, event: str | None = None) -> str:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"


async def events(ticket: Ticket) -> AsyncIterator[tuple[int, Event] | None]:
    """What the rows tell; None after a silence. Errors: Refusal."""
    while True:
        try:
            yield await asyncio.wait_for(ticket.next(), SILENCE_S)
        except TimeoutError:
            yield None


class Stream(StreamingResponse):
    """Server-sent events that hold a ticket until they end, however they end."""

    def __init__(self, lines: AsyncIterator[str], ticket: Ticket, metrics: Metrics) -> None:
        super().__init__(self._safe(lines), media_type="text/event-stream",
                         headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._ticket, self._metrics, self._whole = ticket, metrics, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._ticket:
            await super().__call__(scope, receive, send)
        if not self._whole:
            self._metrics.add("mmllm_hung_up_total")

    async def _safe(self, lines: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for line in lines:
                yield line
        except Refusal as error:  # the status has been sent: the error is an event
            yield sse(error.body)
        self._whole = True
