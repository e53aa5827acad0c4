"""What a client did wrong, or the server cannot do: one sentence, in the shape that OpenAI's clients read.

    {"error": {"message": …, "type": …, "param": …, "code": …}}"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):
    """Ends a request with a status and a sentence."""

    def __init__(self, status: int, sentence: str, *, param: str | None = None, code: str | None = None,
                 retry_s: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code, self.retry_s = status, code, retry_s
        self.sentence = sentence.encode("utf-8", "replace").decode()  # what a client wrote may be in it
        self.param = param and param.encode("utf-8", "replace").decode()

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.sentence, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        more = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return more if self.retry_s is None else {**more, "Retry-After": str(self.retry_s)}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body, self.status, {**self.headers, **(headers or {})})


def add_to(app: FastAPI) -> None:
    """Everything that ends a request badly ends it in this shape."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        return error.response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors()).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        sentences = {404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        return Refusal(error.status_code, sentences.get(error.status_code, str(error.detail))).response(error.headers)

    async def failed(request: Request, error: Exception) -> JSONResponse:  # the log has the trace, the client does not
        return Refusal(500, "the server failed at this request; its log says why").response()

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def of_validation(errors: Any) -> Refusal:
    """The first thing that is wrong with a request, deepest first: of a union's branches it is the one that was meant."""
    error = max(errors, key=lambda e: len(e["loc"]))
    field = ".".join(str(part) for part in error["loc"][1:] if not str(part).startswith(("list[", "function-", "tagged-", "constrained-")))
    if error["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {error.get('ctx', {}).get('error', 'it cannot be read')}", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return Refusal(400, f"unknown parameter {field}", param=field, code="unknown_parameter")
    if error["type"] == "missing":
        what = f"{field} is missing" if field else "the request has no JSON body (Content-Type: application/json)"
        return Refusal(400, what, param=field or None, code="missing_parameter")
    said = error["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{field or 'the body'}: {said[:1].lower()}{said[1:]}", param=field or None, code="invalid_value")
