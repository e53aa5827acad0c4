"""Malformed, oversized and hostile requests by a plain HTTP client: the right status, one sentence, never a trace."""

import base64
import http.client
import io
import json
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from PIL import Image
from serving import Served

from mmllm.serve.api import main
from mmllm.serve.pictures import data_url
from mmllm.serve.settings import Settings

JSON = {"Content-Type": "application/json"}
CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = serving.drawer(tmp_path_factory.mktemp("limits") / "model")
    settings = Settings(max_body=300_000, max_pixels=100_000, max_prompt=300, max_text=32, max_n=3, max_pictures=2, body_s=0.5)
    with serving.serving(engine, settings) as found:
        yield found


def send(served: Served, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(served.url.split("/")[2], timeout=10)
    data = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
    connection.request(method, path, data, JSON if headers is None else headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text


def refused(served: Served, status: int, sentence: str, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
    got, answer = send(served, "POST", path, body, headers)
    error = answer["error"]
    assert (got, set(error)) == (status, {"message", "type", "param", "code"})
    assert sentence in error["message"] and "Traceback" not in error["message"] and "\n" not in error["message"]
    assert len(error["message"]) < 400


def chat(*content: Any, **more: Any) -> dict[str, Any]:
    said = content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)
    return {"model": "mmllm", "messages": [{"role": "user", "content": said}], "max_tokens": 4, **more}


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def file(size: tuple[int, int], kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 × 30,000 pixels that is a few bytes."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    head = chunk(b"IHDR", (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


TEXT = {"type": "text", "text": "how many?"}
DOT = data_url(file((8, 8)))

BAD: dict[str, tuple[int, str, str, Any]] = {
    "no json": (400, "the body is not JSON", CHAT, "{'model'"),
    "no body": (400, "no JSON body", CHAT, None),
    "json of something else": (400, "the body", CHAT, [1, 2]),
    "deep json": (400, "", CHAT, "[" * 100_000),
    "a number of 5,000 digits": (400, "", CHAT, '{"model": "mmllm", "n": ' + "9" * 5_000 + "}"),
    "half a surrogate": (400, "messages.0.content", CHAT, '{"model": "mmllm", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    "half a surrogate as a name": (400, "the body", CHAT, '{"\\udfff": 1, "model": "mmllm", "messages": []}'),
    "half a surrogate as a model": (400, "model: ", CHAT, '{"model": "\\udfff", "messages": [{"role": "user", "content": "a"}]}'),
    "NaN": (400, "temperature", CHAT, '{"model": "mmllm", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}'),
    "unknown parameter": (400, "unknown parameter wings", CHAT, chat("a", wings=2)),
    "unknown parameter of a message": (400, "unknown parameter messages.0.wings", CHAT,
                                       {"model": "mmllm", "messages": [{"role": "user", "content": "a", "wings": 2}]}),
    "what OpenAI has and we do not": (400, "tools: this model has no such thing", CHAT, chat("a", tools=[{"type": "function"}])),
    "another model": (404, "there is no model 'gpt-4o'", CHAT, chat("a", model="gpt-4o")),
    "no model": (400, "model is missing", CHAT, {"messages": [{"role": "user", "content": "a"}]}),
    "no messages": (400, "messages", CHAT, {"model": "mmllm", "messages": []}),
    "an empty message": (400, "messages.0: the message is empty", CHAT, chat("  ")),
    "no content": (400, "messages.0: the message is empty", CHAT, {"model": "mmllm", "messages": [{"role": "user"}]}),
    "unknown role": (400, "messages.0.role", CHAT, {"model": "mmllm", "messages": [{"role": "god", "content": "a"}]}),
    "unknown part": (400, "messages.0.content", CHAT, chat({"type": "smell", "text": "a"})),
    "the assistant last": (400, "a prompt ends in a user's turn", CHAT,
                           {"model": "mmllm", "messages": [{"role": "assistant", "content": "a"}]}),
    "two turns of one": (400, "user and assistant alternate", CHAT, {"model": "mmllm", "messages": [{"role": "user", "content": "a"}] * 2}),
    "too many answers": (400, "n: 4 is over the limit of 3", CHAT, chat("a", n=4)),
    "no answers": (400, "n: ", CHAT, chat("a", n=0)),
    "too hot": (400, "temperature", CHAT, chat("a", temperature=1e9)),
    "top_p of nothing": (400, "top_p", CHAT, chat("a", top_p=0)),
    "top_p of next to nothing": (400, "top_p", DRAW, {"prompt": "a", "top_p": 5e-324}),
    "a seed too large": (400, "seed", CHAT, chat("a", seed=2**63)),
    "too long a prompt": (400, "messages: ", CHAT, chat("three " * 400)),
    "a text far too long": (400, "characters cannot fit", CHAT, chat("a" * 20_000)),
    "a request too large": (413, "over the limit of 300,000 bytes", CHAT, chat("a" * 400_000)),
    "no base64": (400, "messages.0: what follows base64, is not base64", CHAT, chat(TEXT, picture("data:image/png;base64,!!!"))),
    "no picture": (400, "does not decode as a picture", CHAT, chat(picture(data_url(b"hello")))),
    "half a picture": (400, "does not decode as a picture", CHAT, chat(picture(data_url(file((64, 64), "jpeg")[:300])))),
    "a bomb": (413, "900000000 pixels", CHAT, chat(picture(data_url(bomb())))),
    "a picture too large": (413, "over the cap of 100,000", CHAT, chat(picture(data_url(file((400, 300)))))),
    "too narrow a picture": (400, "too narrow", CHAT, chat(picture(data_url(file((2_000, 1)))))),
    "too many pictures": (400, "3 pictures are over the limit of 2", CHAT, chat(*[picture(DOT)] * 3, TEXT)),
    "a picture by URL": (400, "fetches no pictures by URL", CHAT, chat(picture("http://example.org/x.png"))),
    "a file of ours": (400, "a picture is given as", CHAT, chat(picture("file:///etc/passwd"))),
    "another kind of data": (400, "begins with data:image", CHAT, chat(picture("data:text/html;base64,AAAA"))),
    "an empty prompt": (400, "prompt: it is empty", DRAW, {"prompt": " "}),
    "no prompt": (400, "prompt is missing", DRAW, {}),
    "absurd size": (400, "size: '9999999999x1' is none of 24x24", DRAW, {"prompt": "a", "size": "9999999999x1"}),
    "no size": (400, "size", DRAW, {"prompt": "a", "size": ""}),
    "too many pictures drawn": (400, "n: 100 is over", DRAW, {"prompt": "a", "n": 100}),
    "too much guidance": (400, "guidance", DRAW, {"prompt": "a", "guidance": 1e30}),
    "negative prompt without guidance": (400, "without guidance it says nothing", DRAW, {"prompt": "a", "negative_prompt": "b"}),
    "a prompt too long": (400, "prompt: ", DRAW, {"prompt": "three " * 400}),
    "another format": (400, "output_format", DRAW, {"prompt": "a", "output_format": "webp"}),
    "an edit of a model that cannot": (400, "not tuned to edit", EDIT, {"prompt": "a"}),
    "nowhere": (404, "there is nothing at /v1/embeddings", "/v1/embeddings", {}),
    "the wrong method": (405, "/v1/models does not take POST", "/v1/models", {}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_one_sentence(served: Served, name: str) -> None:
    status, sentence, path, body = BAD[name]
    refused(served, status, sentence, path, body)
    assert send(served, "GET", "/health") == (200, {"status": "ok"})


def test_an_answer_is_no_longer_than_the_server_allows_whoever_asks(served: Served) -> None:
    for more in ({"max_tokens": 10**9}, {"max_completion_tokens": 4_096}, {}):
        status, answer = send(served, "POST", CHAT, chat("how many?", max_pictures=0) | more)
        assert status == 200 and answer["usage"]["completion_tokens"] <= 32


def test_settings_that_make_no_sense_and_a_port_that_is_taken_are_said_before_a_model_is_loaded(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--rows 0 must be at least 1"):
        Settings(rows=0)
    with pytest.raises(ValueError, match="never fit a --queue of 2"):
        Settings(queue=2)
    with pytest.raises(OSError, match="cannot listen on"):
        main(tmp_path / "nothing", Settings(port=int(served.url.rsplit(":", 1)[1])))


def test_what_is_next_to_zero_is_zero(served: Served) -> None:
    cold, zero = (send(served, "POST", DRAW, {"prompt": "a", "temperature": value}) for value in (1e-320, 0))
    assert cold[0] == 200 and cold[1]["data"] == zero[1]["data"]
    assert send(served, "POST", DRAW, {"prompt": "a", "temperature": 1e-5, "top_p": 1e-6, "guidance": -100})[0] == 200


def test_a_body_that_is_not_declared_as_json_is_not_read_as_json(served: Served) -> None:
    """A page elsewhere can send text/plain without asking the browser first."""
    refused(served, 400, "", CHAT, json.dumps(chat("a")), {"Content-Type": "text/plain"})


def test_another_name_for_this_machine_is_refused(served: Served) -> None:
    refused(served, 400, "answers to localhost only", CHAT, chat("a"), {**JSON, "Host": "evil.example"})
    port = served.url.rsplit(":", 1)[1]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}", "localhost"):
        assert send(served, "GET", "/health", headers={"Host": host})[0] == 200, host


def test_nobody_guesses_the_name_of_a_picture(served: Served) -> None:
    for name in ("x", "..%2f..%2fetc%2fpasswd", "%00", "a" * 5_000):
        status, answer = send(served, "GET", f"/v1/mmllm/pictures/{name}")
        assert status == 404 and "error" in answer


def raw(served: Served, data: bytes, end: bool = False) -> bytes:
    with socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])), 10) as plain:
        plain.sendall(data)
        if end:
            plain.shutdown(socket.SHUT_WR)
        plain.settimeout(10)
        return plain.recv(65_536)


def test_bytes_that_are_no_http_and_bodies_that_never_come_end_by_themselves(served: Served) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 400 " in raw(served, b"\x16\x03\x01\x02\x00\r\n\r\n")
    assert b" 408 " in raw(served, head + b"Content-Length: 100\r\n\r\n{")
    assert b" 413 " in raw(served, head + b"Content-Length: 99999999999\r\n\r\n{")
    assert b" 400 " in raw(served, head + b"Content-Length: -5\r\n\r\n{")
    chunks = b"".join(b"%x\r\n%s\r\n" % (50_000, b"a" * 50_000) for _ in range(8)) + b"0\r\n\r\n"
    assert b" 413 " in raw(served, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    raw(served, head + b"Content-Length: 100\r\n\r\n{", end=True)
    assert send(served, "GET", "/health")[0] == 200


def test_pages_elsewhere_may_call_only_where_they_are_named(served: Served) -> None:
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert send(served, "OPTIONS", CHAT, headers=asks)[0] == 405
    with serving.serving(served.engine, Settings(origins=("https://app.example",))) as open_to_one:
        assert send(open_to_one, "OPTIONS", CHAT, headers=asks)[0] == 200
        assert send(open_to_one, "OPTIONS", CHAT, headers={**asks, "Origin": "https://other.example"})[0] == 400


def test_a_form_that_is_broken_is_refused(served: Served) -> None:
    with serving.serving(served.engine, Settings(edits=True, max_pictures=2)) as editing:
        def form(*fields: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
            parts = [b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), data) for head, data in fields]
            return b"".join(parts) + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}

        image = ('name="image"; filename="x.png"', file((24, 24)))
        for sentence, fields in {"prompt is missing": [image], "image is missing": [('name="prompt"', b"a")],
                                 "unknown parameter mask": [image, ('name="mask"; filename="m.png"', b"")],
                                 "unknown parameter wings": [image, ('name="prompt"', b"a"), ('name="wings"', b"2")],
                                 "n: input should be": [image, ('name="prompt"', b"a"), ('name="n"', b"many")],
                                 "Too many files": [image] * 3 + [('name="prompt"', b"a")],
                                 "does not decode": [('name="image"; filename="x"', b"hello"), ('name="prompt"', b"a")]}.items():
            refused(editing, 400, sentence, EDIT, *form(*fields))
        refused(editing, 400, "no form", EDIT, {"prompt": "a"})
        refused(editing, 400, "", EDIT, b"--x\r\nnonsense", {"Content-Type": "multipart/form-data"})
        assert send(editing, "POST", EDIT, *form(image, ('name="prompt"', b"a"), ('name="n"', b"2")))[0] == 200


def test_a_picture_by_url_needs_leave_and_a_public_address(served: Served) -> None:
    with serving.serving(served.engine, Settings(remote_pictures=True)) as fetching:
        for url in (f"{served.url}/health", "http://localhost/", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest/meta-data",
                    "http://10.0.0.1/x.png", "http://2130706433/", "http://0/"):
            refused(fetching, 400, "private network", CHAT, chat(picture(url)))
        refused(fetching, 400, "user name or password", CHAT, chat(picture("http://me:secret@example.org/x.png")))
        refused(fetching, 400, "cannot be read", CHAT, chat(picture("http://[::1/x.png")))


def test_padding_of_base64_is_wanted_but_any_picture_that_decodes_is_taken(served: Served) -> None:
    for kind in ("png", "jpeg", "webp", "gif", "bmp"):
        url = f"data:image/{kind};base64,{base64.b64encode(file((30, 20), kind)).decode()}"
        assert send(served, "POST", CHAT, chat(TEXT, picture(url)))[0] == 200
