"""POST /v1/images/generations and /v1/images/edits: pictures for words, or for pictures and words.

A picture depends on prompt, seed and its number below n, as `Engine.draw` has it; not on who else draws."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from data import chat
from mmllm.generate.plan import Plan
from mmllm.generate.request import Request as Row
from mmllm.generate.sample import Sampling, request_key
from mmllm.serve.answer import Stream, events, sse, unless_gone
from mmllm.serve.guard import PICTURES
from mmllm.serve.pictures import Codes
from mmllm.serve.refusal import Refusal
from mmllm.serve.schema import STREAMED, Drawing, Problem
from mmllm.serve.service import Service, client_of, seed_of
from mmllm.serve.transcript import End, Line
from mmllm.serve.worker import Ticket

FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["prompt", "image"], "properties": {
        "prompt": {"type": "string"}, "image": {"type": "string", "format": "binary"}, "n": {"type": "integer"},
        "size": {"type": "string"}, "seed": {"type": "integer"}, "guidance": {"type": "number"}, "model": {"type": "string"},
        "response_format": {"enum": ["b64_json", "url"]}}}}}}}


def add_to(app: FastAPI, service: Service) -> None:
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 401, 404, 413, 429, 503)}
    problems[200] = STREAMED

    @app.post("/v1/images/generations", responses=problems)
    async def images_generations(asked: Drawing, request: Request) -> Response:
        """Draw pictures for a prompt."""
        return await _draw(service, asked, [], request)

    @app.post("/v1/images/edits", responses=problems, openapi_extra=FORM)
    async def images_edits(request: Request) -> Response:
        """Draw pictures for a prompt and pictures to change."""
        if not (service.settings.edits and service.engine.folder.chat):
            raise Refusal(400, "this model was not tuned to edit pictures", code="edits_not_supported")
        asked, files = await _form(service, request)
        return await _draw(service, asked, files, request)

    @app.get(PICTURES + "{name}", response_class=Response, responses={404: {"model": Problem}, 200: {"content": {"image/png": {}}}})
    async def pictures(name: str) -> Response:
        """A picture that was handed out by URL."""
        return Response(service.pictures.kept(name), media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    assert callable(images_generations) and callable(images_edits) and callable(pictures)


async def _form(service: Service, request: Request) -> tuple[Drawing, list[bytes]]:
    """Fields and picture files of a multipart form. Errors: Refusal, RequestValidationError."""
    most = service.settings.max_pictures
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal(400, "the request is no form: send multipart/form-data", code="invalid_form")
    fields, files = dict[str, Any](), list[bytes]()
    async with request.form(max_files=most, max_fields=64, max_part_size=service.settings.max_body) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("image", "image[]"):
                    raise Refusal(400, f"unknown parameter {name}", param=name, code="unknown_parameter")
                files.append(await value.read())
            else:
                fields[name] = value
    try:
        asked = Drawing.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error
    if not files:
        raise Refusal(400, "image is missing: a file of the picture to change", param="image", code="missing_parameter")
    return asked, files


@dataclass(frozen=True)
class Begun:
    """A request that has begun."""

    size: str
    seed: int
    prompt_tokens: int
    kind: str
    created: int

    def about(self) -> dict[str, Any]:
        return {"background": "opaque", "output_format": "png", "quality": "auto", "size": self.size, "seed": self.seed}

    def usage(self, ends: list[End]) -> dict[str, Any]:
        drawn = sum(end.image_tokens for end in ends)
        return {"input_tokens": self.prompt_tokens, "output_tokens": drawn, "total_tokens": self.prompt_tokens + drawn,
                "input_tokens_details": {"text_tokens": self.prompt_tokens, "image_tokens": 0}}


async def _draw(service: Service, asked: Drawing, files: list[bytes], request: Request) -> Response:
    service.known(asked.model)
    ticket = service.worker.admit(service.count(asked.n), client_of(request))
    try:
        begun = await unless_gone(request, service.metrics, _begun(service, asked, files, ticket))
        base = str(request.base_url).rstrip("/") + PICTURES if asked.response_format == "url" else None
        if asked.stream:
            return Stream(_chunks(service, asked, begun, base, ticket), ticket, service.metrics)
        with ticket:
            return JSONResponse(await unless_gone(request, service.metrics, _whole(service, begun, base, ticket)))
    except BaseException:
        service.worker.drop(ticket)
        raise


async def _begun(service: Service, asked: Drawing, files: list[bytes], ticket: Ticket) -> Begun:
    """Read the request and put its rows in line."""
    settings = service.settings
    sizes = service.pictures.sizes
    size = next(iter(sizes)) if asked.size in (None, "auto") else asked.size
    if size not in sizes:
        raise Refusal(400, f"size: {size[:40]!r} is none of {', '.join(sizes)}", param="size", code="invalid_size")
    guidance = settings.guidance if asked.guidance is None else asked.guidance
    if asked.negative_prompt is not None and guidance == 1.0:
        raise Refusal(400, "negative_prompt: without guidance it says nothing; give a guidance above 1", param="negative_prompt")
    for param, words in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt)):
        if words is not None:
            service.short(len(words), param)
            if not words.strip():
                raise Refusal(400, f"{param}: it is empty", param=param, code="empty_prompt")
    shown = [await service.pictures.apart(lambda file=file: service.pictures.codes(file, "image")) for file in files]
    warmth = settings.image_temperature if asked.temperature is None else asked.temperature
    how = Sampling(temperature=warmth, top_k=asked.top_k or 0, top_p=asked.top_p or 1.0)
    plan = Plan(image=how, guidance=guidance, negative=asked.negative_prompt or "", only_picture=True)
    seed, grid = seed_of(asked.seed), sizes[size]
    rows = await service.pictures.apart(lambda: _rows(service, asked.prompt, shown, ticket.count, plan, seed, grid))
    for param, ids in (("prompt", rows[0].prompt), ("negative_prompt", rows[0].blank)):
        service.fits(ids, service.engine.grammar.longest, param)
    ticket.start(rows, grid)
    return Begun(size, seed, len(rows[0].prompt), "image_edit" if files else "image_generation", int(time.time()))


def _rows(service: Service, words: str, shown: list[Codes], count: int, plan: Plan, seed: int, grid: tuple[int, int]) -> list[Row]:
    """What to continue: a request to change pictures stands as it is, behind them."""
    engine, folder = service.engine, service.engine.folder
    drawn = engine.draw_requests(words, count, plan, seed, grid)
    if not shown:
        return drawn
    content = [*({"type": "image", "codes": codes} for codes in shown), {"type": "text", "text": words}]
    frame = [folder.vocab.boi, folder.vocab.grid(*grid)]
    prompt = [*chat.prompt([{"role": "user", "content": content}], folder.vocab, folder.text.encode), *frame]
    return [Row(prompt=prompt, plan=plan, key=request_key(seed, number, prompt), blank=drawn[0].blank) for number in range(count)]


async def _picture(service: Service, codes: Codes, base: str | None) -> dict[str, str]:
    """base: of URLs; none puts the picture itself into the answer."""
    file = await service.pictures.painted(codes)
    if base is not None:
        return {"url": base + service.pictures.keep(file)}
    return {"b64_json": base64.b64encode(file).decode()}


async def _whole(service: Service, begun: Begun, base: str | None, ticket: Ticket) -> dict[str, Any]:
    drawn, ends = dict[int, Codes](), list[End]()
    async for event in events(ticket):
        if event is None:
            continue
        row, what = event
        if isinstance(what, Line) and what.whole:
            drawn[row] = what.codes
        elif isinstance(what, End):
            ends.append(what)
            if len(ends) == ticket.count:
                break
    service.metrics.add("mmllm_pictures_total", len(drawn))
    pictures = await asyncio.gather(*(_picture(service, drawn[row], base) for row in range(ticket.count)))
    return {"created": begun.created, **begun.about(), "data": pictures, "usage": begun.usage(ends)}


async def _chunks(service: Service, asked: Drawing, begun: Begun, base: str | None, ticket: Ticket) -> AsyncIterator[str]:
    """OpenAI's events: of every row, or of as many as were asked for; `index`, `row` and `codes` are ours."""
    ends = list[End]()
    async for event in events(ticket):
        if event is None:
            yield ": waiting\n\n"
            continue
        index, what = event
        if isinstance(what, End):
            ends.append(what)
            if len(ends) == ticket.count:
                return
        elif isinstance(what, Line):
            about = {**begun.about(), "created_at": begun.created, "index": index, "grid": what.grid, "row": what.number,
                     "codes": what.codes[:, what.number].tolist()}
            h, wanted = what.grid[0], asked.partial_images
            if not what.whole and (wanted is None or (what.number + 1) * (wanted + 1) // h > what.number * (wanted + 1) // h):
                kind = f"{begun.kind}.partial_image"
                shown = await _picture(service, what.codes, None)
                yield sse({"type": kind, "partial_image_index": what.number, **shown, **about}, kind)
            if what.whole:
                service.metrics.add("mmllm_pictures_total")
                kind, whole = f"{begun.kind}.completed", [End("stop", 0, what.codes.size)]
                yield sse({"type": kind, **await _picture(service, what.codes, base), **about, "usage": begun.usage(whole)}, kind)
