"""What the routes of one process share, and the checks that all of them make."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fastapi import Request

from mmllm.generate.engine import Engine
from mmllm.serve.metrics import Metrics
from mmllm.serve.pictures import Pictures
from mmllm.serve.refusal import Refusal
from mmllm.serve.settings import Settings
from mmllm.serve.worker import Worker

CHARACTERS = 32
"""A text of more characters a token than this is over the limit of tokens, whatever it says: it is not even tokenized."""


@dataclass(frozen=True)
class Service:
    """A loaded model and who waits for it."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    pictures: Pictures
    worker: Worker

    @classmethod
    def of(cls, engine: Engine, settings: Settings) -> "Service":
        metrics = Metrics()
        return cls(engine, settings, metrics, Pictures(engine, settings), Worker(engine, settings, metrics))

    @cached_property
    def fingerprint(self) -> str:
        """Of the files of the model folder as they lie there; weights of gigabytes are not read for it."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.engine.folder.path.rglob("*") if path.is_file()):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
        return f"fp_{digest.hexdigest()[:16]}"

    def known(self, model: str | None) -> None:
        """Errors: Refusal 404 for another model than the one that is served."""
        if model is not None and model != self.settings.name:
            raise Refusal(404, f"there is no model {model[:100]!r}; {self.settings.name!r} is served", param="model",
                          code="model_not_found")

    def count(self, n: int | None) -> int:
        if (n or 1) > self.settings.max_n:
            raise Refusal(400, f"n: {n} is over the limit of {self.settings.max_n}", param="n", code="too_many")
        return n or 1

    def short(self, characters: int, param: str) -> None:
        """Errors: Refusal 400 for a text that is too long to be worth tokenizing."""
        if characters > CHARACTERS * self.settings.max_prompt:
            raise Refusal(400, f"{param}: {characters:,} characters cannot fit the limit of {self.settings.max_prompt:,} tokens",
                          param=param, code="context_length_exceeded")

    def fits(self, prompt: Sequence[int], more: int, param: str) -> None:
        """Errors: Refusal 400 for a prompt over the limit, or one that leaves the model no room for `more` tokens."""
        room = self.engine.folder.max_len
        if len(prompt) > self.settings.max_prompt or len(prompt) + more > room:
            raise Refusal(400, f"{param}: {len(prompt):,} tokens, and {more:,} may be added; the limits are {self.settings.max_prompt:,} "
                               f"and {room:,} together", param=param, code="context_length_exceeded")


def seed_of(seed: int | None) -> int:
    """The client's, or a new one."""
    return secrets.randbits(31) if seed is None else seed


def client_of(request: Request) -> str:
    """Who asks, for a fair line: a key if there are keys, or an address."""
    return request.scope.get("client_name", "")
