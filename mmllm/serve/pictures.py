"""Pictures of clients ↔ codes, on one thread beside the one that decodes.

A picture that we drew has the codes it was drawn with when a client shows it again: its PNG is remembered by its hash. So an answer
goes back into a conversation as the model said it, and no picture of a long chat is encoded twice.
"""

import asyncio
import base64
import binascii
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.images import Limits, Refused, fitted, to_array, to_png, to_tensor, to_uint8
from data.tokens import sizes_of
from mmllm.generate.engine import Engine
from mmllm.serve.refusal import Refusal
from mmllm.serve.remote import fetch
from mmllm.serve.settings import Settings

REMEMBERED = 4_096
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)

Codes = NDArray[np.int32]
T = TypeVar("T")


class Pictures:
    """What the model sees, and what it shows."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self._thread = ThreadPoolExecutor(1, "pictures")
        self._codes = OrderedDict[bytes, Codes]()
        self._kept = OrderedDict[str, bytes]()
        self._kept_bytes = 0
        patch = engine.visual.patch_size
        self.sizes = {f"{w * patch}x{h * patch}": (h, w) for h, w in engine.folder.vocab.grids if (h, w) in engine.visual.grids}
        """WIDTHxHEIGHT in pixels → code grid (h, w)."""

    async def apart(self, work: Callable[[], T]) -> T:
        """What takes long, on the pictures' thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    # In ---------------------------------------------------------------------------------------------------------------

    async def fetched(self, url: str, param: str) -> bytes:
        """The file behind a data: URL, or an http(s) one where that is allowed. Errors: Refusal 400, 413."""
        if url.startswith("data:"):
            head = DATA_URL.match(url)
            if head is None:
                raise Refusal(400, f"{param}: a data: URL of a picture begins with data:image/TYPE;base64,", param=param)
            try:
                return await asyncio.to_thread(base64.b64decode, url[head.end():], validate=True)
            except (binascii.Error, ValueError) as error:
                raise Refusal(400, f"{param}: what follows base64, is not base64", param=param) from error
        if not url.startswith(("http://", "https://")):
            raise Refusal(400, f"{param}: a picture is given as data:image/TYPE;base64,… or by an http(s) URL", param=param)
        if not self.settings.remote_pictures:
            raise Refusal(400, f"{param}: this server fetches no pictures by URL: send it as data:image/TYPE;base64,…", param=param)
        try:
            return await asyncio.to_thread(fetch, url, self.settings.max_body)
        except ValueError as error:
            raise Refusal(400, f"{param}: {error}", param=param) from error

    def codes(self, file: bytes, param: str) -> Codes:
        """Codes [M, h, w] of a picture file. Errors: Refusal 400, 413. On the pictures' thread."""
        name = hashlib.sha256(file).digest()
        if name not in self._codes:
            try:
                picture = fitted(file, sizes_of(self.engine.visual), Limits(max_pixels=self.settings.max_pixels))
            except Refused as error:
                cause = str(error).split(":")[0]
                raise Refusal(413 if cause == "too large" else 400, f"{param}: {error}", param=param, code="invalid_image") from error
            self._remember(name, self.engine.codes(to_tensor(to_array(picture))[None])[0])
        self._codes.move_to_end(name)
        return self._codes[name]

    # Out --------------------------------------------------------------------------------------------------------------

    async def painted(self, codes: Codes) -> bytes:
        """PNG of codes [M, h, w]."""
        def paint() -> bytes:
            if codes.shape[1:] not in self.sizes.values():
                raise Refusal(500, f"the model drew {codes.shape[1]}x{codes.shape[2]} codes, which its visual tokenizer does not paint")
            file = to_png(to_uint8(self.engine.pictures(codes)))
            self._remember(hashlib.sha256(file).digest(), codes)
            return file

        return await self.apart(paint)

    def keep(self, file: bytes) -> str:
        """Keep a picture for a while. → its name, which nobody guesses."""
        name = secrets.token_urlsafe(24)
        self._kept[name] = file
        self._kept_bytes += len(file)
        while self._kept_bytes > self.settings.kept_bytes and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return name

    def kept(self, name: str) -> bytes:
        """Errors: Refusal 404."""
        if name not in self._kept:
            raise Refusal(404, "there is no such picture, or newer ones have pushed it out", code="picture_not_found")
        return self._kept[name]

    def _remember(self, name: bytes, codes: Codes) -> None:
        self._codes[name] = codes
        while len(self._codes) > REMEMBERED:
            self._codes.popitem(last=False)


def data_url(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"
