"""What every request passes before anything reads it: whose it is, how long, how large; and what is counted behind it.

The body is read here, whole, within its limits, and handed on: no route can forget to."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmllm.serve.metrics import Metrics
from mmllm.serve.refusal import Refusal
from mmllm.serve.settings import LOOPBACK, Settings

PICTURES = "/v1/mmllm/pictures/"
"""Served without a key: their names are secrets themselves, and <img> sends none."""
BODIES = 16
"""Bodies of the largest size that may be in memory while they arrive."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Sequence[str], metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._arriving = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        start, status, name = time.monotonic(), 0, secrets.token_hex(8)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode()),
                                                  (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            if body is not None:
                await self.app(scope, _again(body, receive), answer)
        except Refusal as error:
            await error.response()(scope, receive, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # never what a client made up
            self.metrics.add("mmllm_requests_total", path=path, status=status or 499)
            self.metrics.took("mmllm_request_seconds", time.monotonic() - start)

    def _check(self, scope: Scope) -> None:
        request = HTTPConnection(scope)
        if self.settings.private and not self._keys:
            # a page elsewhere may let its own name resolve to this machine; then the browser thinks that we are that page
            host = request.headers.get("host", "").rsplit(":", 1)[0] if not request.headers.get("host", "").endswith("]") else "[::1]"
            if host.strip("[]") not in LOOPBACK:
                raise Refusal(400, "this server answers to localhost only: other names need --host or --api-keys", code="wrong_host")
        path: str = scope["path"]
        scope["client_name"] = (scope.get("client") or ("",))[0]
        if self._keys and (path.startswith("/v1/") or path == "/metrics") and not path.startswith(PICTURES):
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
            known = [hmac.compare_digest(digest, mine) for mine in self._keys]  # all of them: time tells nothing
            if kind.lower() != "bearer" or not any(known):
                raise Refusal(401, "this server wants an API key that it knows: Authorization: Bearer KEY", code="invalid_api_key")
            scope["client_name"] = digest.hex()

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it; None from a client that went away. Errors: Refusal 400, 408, 413, 503."""
        limit = self.settings.max_body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(length) if length.isdigit() and len(length) < 20 else 0
        if size <= limit and self._arriving + size > BODIES * limit:
            raise Refusal(503, "too many large requests arrive at once", code="overloaded", retry_s=5)
        body, seen, end = bytearray(), 0, time.monotonic() + self.settings.body_s
        try:
            while True:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
                if message["type"] == "http.disconnect":
                    self.metrics.add("mmllm_hung_up_total")
                    return None
                piece = message.get("body", b"")
                seen += len(piece)
                if seen <= limit:
                    body += piece
                    self._arriving += len(piece)
                # a client that still sends does not read: its excess is read and dropped, up to a point
                if not message.get("more_body") or seen > 4 * limit or size > 4 * limit:
                    break
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {self.settings.body_s:g} s", code="timeout") from None
        finally:
            self._arriving -= len(body)
        if max(seen, size) > limit:
            raise Refusal(413, f"the request is over the limit of {limit:,} bytes", code="too_large")
        return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what comes."""
    told = False

    async def next_message() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return next_message
