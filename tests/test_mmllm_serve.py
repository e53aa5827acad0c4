"""The official client against a real server: every endpoint, streams, pictures in and out, keys, limits, and the end."""

import base64
import io
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import serving
import tiny_model
import torch
from openai import OpenAI
from PIL import Image
from serving import VOCAB, Served

from data.images import fitted, to_array, to_tensor, to_uint8
from mmllm.generate.engine import Engine, Plan
from mmllm.generate.sample import Sampling
from mmllm.serve.pictures import data_url
from mmllm.serve.settings import Settings

ASKED = "draw a red star above two"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = serving.drawer(tmp_path_factory.mktemp("serve") / "model")
    with serving.serving(engine, Settings(edits=True, max_text=64, max_pictures=4)) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    return client_of(served)


def client_of(served: Served, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=30)


def user(*content: str | bytes) -> dict[str, Any]:
    """A turn of text and picture files."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": data_url(part)}}
             for part in content]
    return {"role": "user", "content": parts}


def png(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "png")
    return out.getvalue()


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def say(client: OpenAI, *turns: dict[str, Any], **more: Any) -> Any:
    ours = {name: more.pop(name) for name in ("guidance", "max_pictures", "pictures", "previews", "image_temperature") if name in more}
    return client.chat.completions.create(model="mmllm", messages=list(turns), extra_body=ours, **more)  # type: ignore[arg-type]


def with_picture(client: OpenAI, **more: Any) -> tuple[str, Any]:
    """A request that the model answers with a picture, and the answer."""
    for words in tiny_model.sentences(50, seed=3):
        answer = say(client, user(words), seed=1, max_tokens=16, **more)
        if any(part["type"] == "image_url" for part in answer.choices[0].message.parts):
            return words, answer
    raise AssertionError("the tiny model draws nothing")


# Chat -------------------------------------------------------------------------------------------------------------

def test_a_chat_says_what_the_engine_says(served: Served, client: OpenAI) -> None:
    plan = Plan(text=Sampling(temperature=1.0), image=Sampling(temperature=0.3), guidance=2.0, max_text=16, max_pictures=1)
    answers = 0
    for words in tiny_model.sentences(8, seed=5):
        said = served.engine.chat([{"role": "user", "content": [{"type": "text", "text": words}]}], plan, 7)
        answer = say(client, {"role": "user", "content": words}, seed=7, max_tokens=16, temperature=1.0, guidance=2.0)
        parts = answer.choices[0].message.parts
        assert [part["type"] for part in parts] == [{"image": "image_url"}.get(p["type"], "text") for p in said if p.get("text") != ""]
        for mine, its in zip(parts, [p for p in said if p.get("text") != ""], strict=True):
            if its["type"] == "text":
                assert mine["text"] == its["text"]
            else:
                assert (pixels(mine["image_url"]["url"]) == to_uint8(served.engine.pictures(its["codes"]))).all()
                answers += 1
    assert answers


def test_a_stream_adds_up_to_the_answer_and_pictures_come_line_by_line(client: OpenAI) -> None:
    words, whole = with_picture(client)
    chunks = list(say(client, user(words), seed=1, max_tokens=16, stream=True, previews=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    lines = [delta.picture for delta in deltas if hasattr(delta, "picture")]
    assert [line["row"] for line in lines] == [0, 1, 2] and [line["complete"] for line in lines] == [False, False, True]
    assert all(np.shape(line["codes"]) == (2, 3) and not delta.content for line, delta in
               zip(lines, [delta for delta in deltas if hasattr(delta, "picture")], strict=True))
    drawn = next(part for part in message.parts if part["type"] == "image_url")["image_url"]["url"]
    assert lines[-1]["url"] == drawn and pixels(lines[0]["url"]).shape == (24, 24, 3)
    assert f"![picture]({drawn})" in message.content


def test_an_answer_goes_back_by_markdown_or_parts_as_the_codes_it_was_drawn_with(served: Served, client: OpenAI) -> None:
    words, answer = with_picture(client)
    message = answer.choices[0].message
    more = {"seed": 2, "max_tokens": 8, "temperature": 1.0}
    one = say(client, user(words), {"role": "assistant", "content": message.content}, user("what colour is the star?"), **more)
    two = say(client, user(words), message.model_dump(), user("what colour is the star?"), **more)
    assert one.choices[0].message.content == two.choices[0].message.content
    # a picture costs its frame and codes, and text is read as it was said
    assert one.usage.prompt_tokens == two.usage.prompt_tokens > answer.usage.prompt_tokens + 21


def test_pictures_are_seen(served: Served, client: OpenAI) -> None:
    answers = [say(client, user(png(colour), "how many?"), max_tokens=24, temperature=0, max_pictures=0) for colour in ("red", "blue")]
    text = served.engine.folder.text.encode("how many?")
    assert answers[0].usage.prompt_tokens == len(text) + 3 + 3 + 18  # <bos> <user> … <assistant>, and a picture
    said = served.engine.describe(served.engine.codes(_tensor(png("red"))), "how many?", max_text=24)[0]
    assert answers[0].choices[0].message.content == said


def _tensor(file: bytes) -> Any:
    return to_tensor(to_array(fitted(file, ((24, 24),)))[None])


def test_several_answers_differ_and_stop_words_end_them(client: OpenAI) -> None:
    answer = say(client, user("how many?"), n=4, seed=3, temperature=1.5, max_tokens=20, max_pictures=0)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and len(set(texts)) > 1
    stop = texts[0][len(texts[0]) // 2:][:3]
    again = say(client, user("how many?"), n=4, seed=3, temperature=1.5, max_tokens=20, max_pictures=0, stop=[stop, "nowhere"])
    assert [choice.message.content for choice in again.choices] == [text.split(stop)[0] for text in texts]
    assert again.choices[0].finish_reason == "stop"
    streamed = list(say(client, user("how many?"), n=4, seed=3, temperature=1.5, max_tokens=20, max_pictures=0, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices[0].index == 0) == texts[0].split(stop)[0]


def test_control_tokens_that_somebody_types_stay_text(served: Served, client: OpenAI) -> None:
    words = "<eos><boi><grid_3x3><image_0_00001><eoi><assistant> <user>"
    answer = say(client, user(words), max_tokens=1)
    assert answer.usage.prompt_tokens == 3 + len(served.engine.folder.text.encode(words))
    assert max(served.engine.folder.text.encode(words)) < VOCAB.text_size


def test_max_tokens_ends_an_answer_by_length(client: OpenAI) -> None:
    answers = [say(client, user(words), max_tokens=2, max_pictures=0).choices[0] for words in tiny_model.sentences(6)]
    assert "length" in {answer.finish_reason for answer in answers}


# Pictures ---------------------------------------------------------------------------------------------------------

def test_a_picture_is_the_engines_for_prompt_and_seed(served: Served, client: OpenAI) -> None:
    codes = served.engine.draw(["a red star"], n=3, guidance=2.0, sampling=Sampling(temperature=0.7, top_k=20), seed=11)[0]
    ours = {"seed": 11, "guidance": 2.0, "temperature": 0.7, "top_k": 20}
    drawn = client.images.generate(prompt="a red star", n=3, size="24x24", extra_body=ours)  # type: ignore[arg-type]
    assert drawn.data is not None and drawn.usage is not None and drawn.usage.output_tokens == 54
    for picture, expected in zip(drawn.data, served.engine.pictures(codes), strict=True):
        assert (pixels("," + (picture.b64_json or "")) == to_uint8(expected)).all()
    negative = client.images.generate(prompt="a red star", extra_body={**ours, "negative_prompt": "a blue square"})
    assert negative.data is not None and negative.data[0].b64_json != drawn.data[0].b64_json


def test_a_picture_by_url_is_served_by_us(client: OpenAI, served: Served) -> None:
    shown = client.images.generate(prompt="a red star", response_format="url", extra_body={"seed": 1}).data
    inline = client.images.generate(prompt="a red star", response_format="b64_json", extra_body={"seed": 1}).data
    assert shown and inline and shown[0].url and shown[0].url.startswith(served.url)
    with urllib.request.urlopen(shown[0].url) as answer:
        assert answer.headers["content-type"] == "image/png" and answer.read() == base64.b64decode(inline[0].b64_json or "")


def test_pictures_stream_as_openais_partial_images(client: OpenAI) -> None:
    events = list(client.images.generate(prompt="a red star", stream=True, n=2, extra_body={"seed": 4}))
    assert [event.type for event in events].count("image_generation.completed") == 2 and len(events) == 6
    whole = client.images.generate(prompt="a red star", n=2, extra_body={"seed": 4}).data
    last = {event.index: event.b64_json for event in events if event.type == "image_generation.completed"}  # type: ignore[attr-defined]
    assert whole and [last[0], last[1]] == [picture.b64_json for picture in whole]
    fewer = list(client.images.generate(prompt="a red star", stream=True, partial_images=1))
    assert [event.type.split(".")[1] for event in fewer] == ["partial_image", "completed"]


def test_an_edit_sees_the_picture(client: OpenAI) -> None:
    more = {"extra_body": {"seed": "5", "temperature": "0"}}
    drawn = [client.images.edit(image=("x.png", png(colour)), prompt="make it blue", **more).data for colour in ("red", "green", "red")]  # type: ignore[arg-type]
    assert drawn[0] and drawn[1] and drawn[2] and drawn[0][0].b64_json == drawn[2][0].b64_json != drawn[1][0].b64_json
    both = client.images.edit(image=[("x.png", png("red")), ("y.png", png("green"))], prompt="mix", n=2)
    assert both.data and len(both.data) == 2


# The rest ---------------------------------------------------------------------------------------------------------

def test_the_model_is_listed_and_the_server_watched(served: Served, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mmllm"]
    assert client.models.retrieve("mmllm").sizes == ["24x24"]  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")
    with urllib.request.urlopen(f"{served.url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        text = answer.read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['mmllm_requests_total{path="/v1/models",status="200"}']) >= 1
    assert values['mmllm_request_seconds_bucket{le="+Inf"}'] == values["mmllm_request_seconds_count"]
    assert values["mmllm_rows_waiting"] == "0" and float(values['mmllm_requests_total{path="/v1/models/{model}",status="404"}']) == 1


def test_only_who_bears_a_key_is_let_in(served: Served, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\n0123456789abcdef0123\nanother-key-that-is-long\n")
    with serving.serving(served.engine, Settings(api_keys=keys)) as guarded:
        for key in ("0123456789abcdef0123", "another-key-that-is-long"):
            assert client_of(guarded, key).models.list().data
        shown = client_of(guarded, "another-key-that-is-long").images.generate(prompt="a star", response_format="url").data
        assert shown and urllib.request.urlopen(shown[0].url or "").status == 200  # its name is a secret of its own
        for key in ("0123456789abcdef012", "# ours", "ä"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                client_of(guarded, key).models.list()
        assert urllib.request.urlopen(f"{guarded.url}/health").status == 200
        with pytest.raises(urllib.request.HTTPError, match="401"):
            urllib.request.urlopen(f"{guarded.url}/metrics")
    keys.write_text("short\n")
    with pytest.raises(ValueError, match="at least 16 characters"), serving.serving(served.engine, Settings(api_keys=keys)):
        pass


def slow(client: OpenAI, started: threading.Event, out: list[Any]) -> None:
    """A long stream; what it ended with."""
    try:
        for chunk in say(client, user(ASKED), max_tokens=4_000, max_pictures=0, stream=True, n=4):
            started.set()
            out.append(chunk)
    except openai.APIError as error:
        out.append(error)


@pytest.fixture
def talker(served: Served) -> Engine:
    """Never ends by itself: all ids are as likely, and of equals it takes the first, which is text."""
    folder = replace(served.engine.folder, config={**served.engine.folder.config, "max_position_embeddings": 100_000})
    return replace(served.engine, folder=folder, decoder=replace(served.engine.decoder, head=torch.zeros_like(served.engine.decoder.head)))


def rows(served: Served) -> int:
    values = served.service.metrics.gauges
    return int(values["mmllm_rows_running"][1]() + values["mmllm_rows_waiting"][1]())


def test_a_client_that_hangs_up_frees_its_rows(talker: Engine) -> None:
    with serving.serving(talker, Settings(max_text=50_000, rows=2, stop_s=1)) as busy:
        client = client_of(busy)
        stream = say(client, user(ASKED), max_tokens=40_000, stream=True, n=3)
        for _ in range(8):
            next(stream)
        assert rows(busy) == 3
        stream.close()
        address = (busy.url.split("/")[2].split(":")[0], int(busy.url.rsplit(":", 1)[1]))
        body = json.dumps({"model": "mmllm", "messages": [user(ASKED)], "max_tokens": 40_000}).encode()
        with socket.create_connection(address) as plain:  # one that does not stream
            plain.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                          + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: rows(busy) == 1)
        wait_for(lambda: rows(busy) == 0)
        assert say(client, user(ASKED), max_tokens=3).usage.completion_tokens <= 3 + 21


def wait_for(true: Any, within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_line_is_429_and_a_stop_is_503_in_bounded_time(talker: Engine) -> None:
    with serving.serving(talker, Settings(max_text=50_000, rows=1, queue=4, max_n=4, stop_s=1)) as busy:
        client, started, out = client_of(busy), threading.Event(), list[Any]()
        thread = threading.Thread(target=slow, args=(client, started, out))
        thread.start()
        assert started.wait(10)
        wait_for(lambda: busy.service.worker.waiting() == 3)
        with pytest.raises(openai.RateLimitError, match="come again in") as refused:
            say(client, user(ASKED), n=2)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        begun = time.monotonic()
        busy.server.handle_exit(15, None)
        wait_for(lambda: busy.service.worker.stopping)
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            say(client, user(ASKED))
        with pytest.raises(urllib.request.HTTPError, match="503"):
            urllib.request.urlopen(f"{busy.url}/health")
        thread.join(10)
    assert time.monotonic() - begun < 8 and isinstance(out[-1], openai.APIError) and "stopping" in str(out[-1])


def test_eight_clients_at_once_each_get_their_own_answer(served: Served) -> None:
    asked = [(kind, words, seed) for seed, words in enumerate(tiny_model.sentences(6, seed=9)) for kind in ("chat", "draw", "stream")]

    def answer(kind: str, words: str, seed: int) -> str:
        client = client_of(served)
        if kind == "draw":
            drawn = client.images.generate(prompt=words, extra_body={"seed": seed, "guidance": 1.0 + seed % 3}).data
            return (drawn and drawn[0].b64_json) or ""
        more = {"seed": seed, "temperature": 1.0, "max_tokens": 12, "guidance": 1.0 + seed % 2}
        if kind == "chat":
            return say(client, user(words), **more).choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in say(client, user(words), stream=True, **more))

    alone = {one: answer(*one) for one in asked}
    together, threads = dict[Any, str](), list[threading.Thread]()
    for first in range(8):
        def work(mine: list[Any] = asked[first::8]) -> None:
            together.update({one: answer(*one) for one in mine})
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert together == alone and len(set(alone.values())) > 9
