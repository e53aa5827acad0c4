"""A real server on a free port, in a thread of the test."""

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import tiny_model
import uvicorn

from mmllm import hf
from mmllm.generate.engine import Engine
from mmllm.serve.api import Server, build
from mmllm.serve.service import Service
from mmllm.serve.settings import Settings


@dataclass(frozen=True)
class Served:
    url: str
    service: Service
    server: Server

    @property
    def engine(self) -> Engine:
        return self.service.engine


VOCAB = replace(tiny_model.vocabulary(), grids=((3, 3),))
"""Only what the tiny visual tokenizer paints."""


def drawer(folder: Path) -> Engine:
    """A tiny tuned model that mixes text and pictures."""
    shape, text = tiny_model.model(), folder.parent / "text.model"
    tiny_model.text_tokenizer().save(text)
    visual = tiny_model.saved_visual_tokenizer(folder.parent, 2, 48)
    weights = tiny_model.weights(shape, VOCAB.size)
    weights["lm_head.weight"][VOCAB.boi] *= 2
    hf.write_folder(folder, weights, shape, VOCAB, text, visual, True, 512)
    return Engine.load(folder, "cpu")


@contextmanager
def serving(engine: Engine, settings: Settings | None = None) -> Generator[Served]:
    settings = settings or Settings()
    app = build(engine, settings)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2),
                        app.state.service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.service, server)
        finally:
            server.handle_exit(15, None)
            thread.join(30)
            app.state.service.pictures.close()
            assert not thread.is_alive()
