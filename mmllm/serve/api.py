"""`mmllm serve`: a model folder behind OpenAI's interface, for its clients, for evaluation suites and for our own page.

    POST /v1/chat/completions      text and pictures in and out              chats.py
    POST /v1/images/generations    pictures for words                        drawings.py
    POST /v1/images/edits          pictures for pictures and words, where the model was tuned to
    GET  /v1/models                what is served, and what it can do
    GET  /health /metrics          for those who watch
    GET  /                         the page                                  web.py

A request passes the guard (guard.py), is checked by its schema (schema.py), becomes rows of ids, waits in line and is decoded together
with others (worker.py); what comes is read as text and lines of pictures (transcript.py). Whatever goes wrong is one sentence
(refusal.py)."""

import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

from mmllm.generate.engine import Engine
from mmllm.progress import say
from mmllm.serve import chats, drawings, metrics, refusal, web
from mmllm.serve.guard import Guard
from mmllm.serve.refusal import Refusal
from mmllm.serve.schema import Problem
from mmllm.serve.service import Service
from mmllm.serve.settings import Settings, read_keys


def build(engine: Engine, settings: Settings) -> FastAPI:
    """The application; `app.state.service` is what its routes share."""
    service = Service.of(engine, settings)
    app = FastAPI(title="mmllm", version="1", docs_url=None, redoc_url=None)  # those pages load from elsewhere
    app.state.service = service
    refusal.add_to(app)
    chats.add_to(app, service)
    drawings.add_to(app, service)
    _add_rest(app, service)
    web.mount(app)
    app.openapi_schema = _published(app.openapi())
    app.add_middleware(Guard, settings=settings, keys=read_keys(settings.api_keys) if settings.api_keys else (), metrics=service.metrics)
    if settings.origins:  # outermost: a preflight bears no key
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"],
                           allow_headers=["Authorization", "Content-Type"])
    return app


def _published(schema: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI says of itself, without the 422 that nobody gets: what is invalid is 400, as OpenAI has it."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema


def _add_rest(app: FastAPI, service: Service) -> None:
    def about() -> dict[str, Any]:
        folder, settings = service.engine.folder, service.settings
        return {"id": settings.name, "object": "model", "created": int((folder.path / "mmllm.json").stat().st_mtime), "owned_by": "mmllm",
                "sizes": list(service.pictures.sizes), "chat": folder.chat, "edits": settings.edits,
                "max_tokens": folder.max_len, "max_n": settings.max_n, "guidance": settings.guidance,
                "image_temperature": settings.image_temperature}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [about()]}

    @app.get("/v1/models/{model}", responses={404: {"model": Problem}})
    async def model(model: str) -> dict[str, Any]:
        """What the model can do."""
        service.known(model)
        return about()

    @app.get("/health", responses={503: {"model": Problem}})
    async def health() -> Response:
        """200 while requests are taken."""
        if service.worker.stopping or not service.worker.alive:
            raise Refusal(503, "the server is stopping", code="stopping", retry_s=10)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def numbers() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=metrics.TYPE)

    assert callable(models) and callable(model) and callable(health) and callable(numbers)


class Server(uvicorn.Server):
    """Stops in order: what runs may end, what is new is refused; a second signal stops at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._ending = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ending:
            super().handle_exit(sig, frame)
            return
        self._ending = True

        def end() -> None:
            say(f"stopping: what runs may take {self.service.settings.stop_s:g} s more")
            self.service.worker.stop(self.service.settings.stop_s)
            self.should_exit = True

        threading.Thread(target=end, name="stop", daemon=True).start()


def main(model: Path, settings: Settings, device: str | None = None, dtype: torch.dtype = torch.float32, int8: bool = False) -> None:
    """Serve a model folder until told to stop. Errors: ValueError, OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:  # before a model is loaded
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"cannot listen on {settings.host}:{settings.port} ({error.strerror}): give another --host or --port") from error
    with listening:
        run(build(Engine.load(model, device, dtype, int8), settings), settings, listening)


def run(app: FastAPI, settings: Settings, listening: socket.socket) -> None:
    """Until SIGINT or SIGTERM."""
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"{settings.name} answers on {address}/v1, and its page is {address}/")
    if not settings.private and settings.api_keys is None:
        say("everybody who reaches that address may use it: --api-keys FILE lets in only who bears a key")
    service: Service = app.state.service
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                            timeout_graceful_shutdown=2, timeout_keep_alive=30)
    server = Server(config, service)
    server.run(sockets=[listening])
    service.pictures.close()
