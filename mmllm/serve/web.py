"""The page that `mmllm serve` shows at /: chat, drawing, guidance side by side, and what a picture is in tokens.

Plain HTML, CSS and JavaScript modules beside this file. It speaks the same public API as everybody, loads nothing from elsewhere, and its
Content-Security-Policy forbids to: what a model or a client writes stays text.
"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

from mmllm.serve import tokens
from mmllm.serve.refusal import Refusal
from mmllm.serve.service import Service

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def mount(app: FastAPI) -> None:
    """Add the page, and the endpoint that only it needs, to an application whose `state.service` is set."""
    service: Service = app.state.service
    tokens.add_to(app, service)
    files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in TYPES}

    def answer(name: str) -> Response:
        return Response(files[name], media_type=TYPES[Path(name).suffix], headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answer("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise Refusal(404, f"the page has no {name[:100]!r}", code="not_found")
        return answer(name)

    assert callable(index) and callable(file)
