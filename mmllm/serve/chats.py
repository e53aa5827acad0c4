"""POST /v1/chat/completions: a conversation of text and pictures, continued by text and pictures.

`content` is what an ordinary client shows, with pictures as Markdown; `parts`, ours, says the same in order, as OpenAI's content parts.
While a picture forms, its lines come as chunks whose `delta` holds no content but `picture`, ours: clients that do not know it add
nothing to the text. A client sends our message back as it came, by either."""

import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from data import chat
from mmllm.generate.plan import Plan
from mmllm.generate.request import Request as Row
from mmllm.generate.sample import Sampling, request_key
from mmllm.serve.answer import Stream, sse, unless_gone
from mmllm.serve.pictures import data_url
from mmllm.serve.refusal import Refusal
from mmllm.serve.schema import STREAMED, ChatRequest, ImagePart, ImageUrl, Message, Part, Problem, TextPart
from mmllm.serve.service import Service, client_of, seed_of
from mmllm.serve.stops import told
from mmllm.serve.transcript import End, Line, Words
from mmllm.serve.worker import Ticket

MARKDOWN = re.compile(r"!\[[^\]]*\]\((data:image/png;base64,[A-Za-z0-9+/=]+)\)")


def add_to(app: FastAPI, service: Service) -> None:
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 401, 404, 413, 429, 503)}

    @app.post("/v1/chat/completions", responses={200: STREAMED, **problems})
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await _answer(service, asked, request)

    assert callable(chat_completions)


async def _answer(service: Service, asked: ChatRequest, request: Request) -> Response:
    if not service.engine.folder.chat:
        raise Refusal(400, "this model was not tuned on conversations: ask /v1/images/generations", code="not_a_chat_model")
    service.known(asked.model)
    ticket = service.worker.admit(service.count(asked.n), client_of(request))
    try:
        conversation = await unless_gone(request, service.metrics, _begun(service, asked, ticket))
        if asked.stream:
            return Stream(_chunks(service, asked, conversation, ticket), ticket, service.metrics)
        with ticket:
            return JSONResponse(await unless_gone(request, service.metrics, _whole(service, asked, conversation, ticket)))
    except BaseException:
        service.worker.drop(ticket)
        raise


@dataclass
class Conversation:
    """A request that has begun."""

    prompt_tokens: int
    seed: int
    fingerprint: str
    name: str = field(default_factory=lambda: f"chatcmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": model, "seed": self.seed,
                "system_fingerprint": self.fingerprint}

    def usage(self, ends: list[End]) -> dict[str, int]:
        said = sum(end.text_tokens + end.image_tokens for end in ends)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": said, "total_tokens": self.prompt_tokens + said}


# In ---------------------------------------------------------------------------------------------------------------

async def _begun(service: Service, asked: ChatRequest, ticket: Ticket) -> Conversation:
    """Read the conversation and put its rows in line."""
    folder = service.engine.folder
    turns = await _turns(service, asked.messages)

    def encoded() -> list[int]:
        try:
            return chat.prompt(turns, folder.vocab, folder.text.encode)
        except ValueError as error:
            raise Refusal(400, f"messages: {error}", param="messages") from error

    prompt = await service.pictures.apart(encoded)
    plan, seed = _plan(service, asked, len(prompt)), seed_of(asked.seed)
    service.fits(prompt, plan.most(service.engine.grammar.longest), "messages")
    ticket.start([Row(prompt=prompt, plan=plan, key=request_key(seed, number, prompt)) for number in range(ticket.count)])
    return Conversation(len(prompt), seed, service.fingerprint)


def _plan(service: Service, asked: ChatRequest, prompt_len: int) -> Plan:
    settings = service.settings
    room = service.engine.folder.max_len - prompt_len - asked.max_pictures * service.engine.grammar.longest
    # an upper bound, of the client as of ours: who asks for more gets an answer that ends by length
    most = max(1, min(asked.max_completion_tokens or asked.max_tokens or settings.max_text // 4, settings.max_text, room))
    text = Sampling(temperature=asked.temperature or 0.0, top_k=asked.top_k or 0, top_p=asked.top_p or 1.0)
    warmth = settings.image_temperature if asked.image_temperature is None else asked.image_temperature
    image = Sampling(temperature=warmth, top_k=asked.image_top_k or 0, top_p=asked.image_top_p or 1.0)
    guidance = settings.guidance if asked.guidance is None else asked.guidance
    return Plan(text=text, image=image, guidance=guidance, max_text=most, max_pictures=asked.max_pictures)


async def _turns(service: Service, messages: list[Message]) -> list[dict[str, Any]]:
    """Turns as `data.chat` takes them. Errors: Refusal."""
    parts = [_parts(message, number) for number, message in enumerate(messages)]
    service.short(sum(len(part.text) for some in parts for part in some if isinstance(part, TextPart)), "messages")
    shown = sum(isinstance(part, ImagePart) for some in parts for part in some)
    if shown > service.settings.max_pictures:
        raise Refusal(400, f"messages: {shown} pictures are over the limit of {service.settings.max_pictures}", param="messages",
                      code="too_many")
    turns = list[dict[str, Any]]()
    for number, (message, some) in enumerate(zip(messages, parts, strict=True)):
        content = list[dict[str, Any]]()
        for part in some:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            else:
                where = f"messages.{number}"
                file = await service.pictures.fetched(part.image_url.url, where)
                codes = await service.pictures.apart(lambda file=file, where=where: service.pictures.codes(file, where))
                content.append({"type": "image", "codes": codes})
        turns.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return turns


def _parts(message: Message, number: int) -> list[Part]:
    """Errors: Refusal 400 for a message that says nothing."""
    where = f"messages.{number}"
    if message.parts is not None and message.role != "assistant":
        raise Refusal(400, f"{where}: only an assistant's message has parts", param=where)
    said = message.content if message.parts is None else message.parts
    if message.role == "assistant" and isinstance(said, str):  # our own Markdown: text, URL, text, …
        pieces = MARKDOWN.split(said)
        parts: list[Part] = [ImagePart(type="image_url", image_url=ImageUrl(url=piece)) if i % 2 else TextPart(type="text", text=piece)
                             for i, piece in enumerate(pieces)]
        return [part for part in parts if isinstance(part, ImagePart) or part.text]
    parts = [TextPart(type="text", text=said)] if isinstance(said, str) else list(said or [])
    if message.role == "system" and any(isinstance(part, ImagePart) for part in parts):
        raise Refusal(400, f"{where}: a {message.role}'s message shows no pictures", param=where)
    if message.role != "assistant" and not any(isinstance(part, ImagePart) or part.text.strip() for part in parts):
        raise Refusal(400, f"{where}: the message is empty", param=where, code="empty_message")
    return parts


# Out --------------------------------------------------------------------------------------------------------------

async def _whole(service: Service, asked: ChatRequest, conversation: Conversation, ticket: Ticket) -> dict[str, Any]:
    rows: list[list[dict[str, Any]]] = [[] for _ in range(ticket.count)]
    ends = dict[int, End]()
    async for event in told(asked.stop, ticket):
        if event is None:
            continue
        row, what = event
        parts = rows[row]
        if isinstance(what, End):
            ends[row] = what
        elif isinstance(what, Words):
            if not parts or parts[-1]["type"] != "text":
                parts.append({"type": "text", "text": ""})
            parts[-1]["text"] += what.text
        elif what.whole:
            url = data_url(await service.pictures.painted(what.codes))
            service.metrics.add("mmllm_pictures_total")
            parts.append({"type": "image_url", "image_url": {"url": url}})
    choices = [{"index": row, "finish_reason": ends[row].reason, "logprobs": None, "message": {
        "role": "assistant", "content": "".join(map(_content, parts) if asked.pictures == "markdown" else
                                                (part.get("text", "") for part in parts)),
        "refusal": None, "parts": parts}} for row, parts in enumerate(rows)]
    return {**conversation.head("chat.completion", service.settings.name), "choices": choices,
            "usage": conversation.usage(list(ends.values()))}


def _content(part: dict[str, Any]) -> str:
    return part["text"] if part["type"] == "text" else f"![picture]({part['image_url']['url']})"


async def _chunks(service: Service, asked: ChatRequest, conversation: Conversation, ticket: Ticket) -> AsyncIterator[str]:
    head = conversation.head("chat.completion.chunk", service.settings.name)
    counted = asked.stream_options is not None and asked.stream_options.include_usage
    ends = list[End]()

    def chunk(row: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": row, "delta": delta, "logprobs": None, "finish_reason": reason}
        return sse({**head, "choices": [choice], **({"usage": None} if counted else {})})

    for row in range(ticket.count):
        yield chunk(row, {"role": "assistant", "content": ""})
    async for event in told(asked.stop, ticket):
        if event is None:
            yield ": waiting\n\n"
            continue
        row, what = event
        if isinstance(what, Words):
            yield chunk(row, {"content": what.text})
        elif isinstance(what, Line):
            picture: dict[str, Any] = {"number": what.picture, "grid": what.grid, "row": what.number,
                                       "codes": what.codes[:, what.number].tolist(), "complete": what.whole}
            shown = asked.previews or (what.whole and asked.pictures == "parts")
            url = data_url(await service.pictures.painted(what.codes)) if shown or what.whole else ""
            yield chunk(row, {"picture": {**picture, **({"url": url} if shown else {})}})
            if what.whole:
                service.metrics.add("mmllm_pictures_total")
                if asked.pictures == "markdown":
                    yield chunk(row, {"content": f"![picture]({url})"})
        else:
            ends.append(what)
            yield chunk(row, {}, what.reason)
    if counted:
        yield sse({**head, "choices": [], "usage": conversation.usage(ends)})
    yield sse("[DONE]")
