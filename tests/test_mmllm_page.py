"""The page in a real browser, as a person drives it; and the endpoint that only it needs."""

import base64
import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
import torch
from serving import Served

from data.images import to_png, to_uint8
from mmllm.generate.sample import Sampling
from mmllm.serve.pictures import data_url
from mmllm.serve.settings import Settings
from mmllm.serve.tokens import likelihood
from mmllm.serve.web import PAGE

KEY = "0123456789abcdef0123"
ASKED = "draw a red star above two"
RED = to_png(np.tile(np.array([200, 30, 40], np.uint8), (24, 24, 1)))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = serving.drawer(tmp_path_factory.mktemp("page") / "model")
    with serving.serving(engine, Settings(max_text=64)) as found:
        yield found


def ask(served: Served, path: str, body: Any = None) -> tuple[int, bytes, Any]:
    """→ status, body, headers"""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(served.url + path, data, {"Content-Type": "application/json"})) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


# What a picture is to the model -----------------------------------------------------------------------------------

@torch.inference_mode()
def test_codes_are_as_likely_as_one_forward_for_each_says(served: Served) -> None:
    engine, vocab = served.engine, served.engine.folder.vocab
    codes = engine.draw(["a red star"], seed=5)[0, 0]
    prompts = [list(engine.draw_requests("a red star")[0].prompt), [vocab.bos, vocab.boi, vocab.grid(3, 3)]]
    found = likelihood(engine, prompts, codes, top=4)
    ids = vocab.image_ids(codes).tolist()
    for place, token in enumerate(ids):
        low = vocab.first_image + place % 2 * vocab.codebook_size
        at = (place % 2, *divmod(place // 2, 3))  # book, row, column
        for row, prompt in enumerate(prompts):
            hidden, _ = engine.decoder.start([[*prompt, *ids[:place]]], 0)
            p = engine.decoder.logits(hidden, low, low + vocab.codebook_size)[0].softmax(-1)
            assert abs(float(p[token - low]) - float(found.probability[row][at])) < 1e-4
            if row == 0:
                assert int((p > p[token - low]).sum()) == found.rank[row][at]
                assert torch.allclose(p.sort(descending=True).values[:4], found.top_probability[at], atol=1e-4)


def test_a_drawn_picture_shows_the_codes_it_was_drawn_with(served: Served) -> None:
    status, body, _ = ask(served, "/v1/images/generations", {"prompt": "a red star", "seed": 5})
    url = data_url(base64.b64decode(json.loads(body)["data"][0]["b64_json"]))
    status, body, _ = ask(served, "/v1/mmllm/tokens", {"picture": url, "prompt": "a red star", "top": 3})
    told = json.loads(body)
    codes = served.engine.draw(["a red star"], seed=5, sampling=Sampling(temperature=served.service.settings.image_temperature))[0, 0]
    assert status == 200 and told["codes"] == codes.tolist() and told["url"] == url and told["grid"] == [3, 3]
    assert np.array(told["top"]).shape == (2, 3, 3, 3) and np.array(told["without"]).shape == (2, 3, 3)
    assert told["bits"] == pytest.approx(-np.log2(np.maximum(told["probability"], 1e-30)).sum(), rel=1e-4)
    told = json.loads(ask(served, "/v1/mmllm/tokens", {"codes": told["codes"]})[1])
    assert told["without"] is None and told["bits"] == told["bits_without"] and told["url"] == url


@pytest.mark.parametrize(("body", "sentence"), [
    ({}, "one of the two"), ({"picture": data_url(RED), "codes": []}, "one of the two"), ({"picture": "red"}, "data:image"),
    ({"codes": []}, "2 books of 3x3"), ({"codes": [[[0] * 3] * 3]}, "2 books"), ({"codes": [[[0] * 3] * 3, [[0] * 2] * 3]}, "2 books"),
    ({"codes": [[[0] * 3] * 3, [[0, 0, 48]] * 3]}, "[0, 48)"), ({"codes": [[[0] * 3] * 3, [[0, 0, -10**30]] * 3]}, "[0, 48)"),
    ({"picture": data_url(RED), "prompt": "a " * 3_000}, "limits are"), ({"picture": data_url(RED), "tap": 1}, "unknown parameter tap"),
    ({"picture": data_url(RED), "top": 99}, "top"),
])
def test_what_is_no_picture_is_refused_with_a_sentence(served: Served, body: Any, sentence: str) -> None:
    status, answer, _ = ask(served, "/v1/mmllm/tokens", body)
    assert status == 400 and sentence in json.loads(answer)["error"]["message"]


# What is served ---------------------------------------------------------------------------------------------------

def test_the_page_names_nothing_that_is_elsewhere_or_missing(served: Served) -> None:
    status, index, headers = ask(served, "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    names = {path.name for path in PAGE.iterdir()}
    for path in PAGE.iterdir():
        status, body, headers = ask(served, f"/page/{path.name}")
        assert status == 200 and body == path.read_bytes() and headers["X-Content-Type-Options"] == "nosniff"
        text = body.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text
        assert set(re.findall(r'"(?:page|\.)/([\w.]+)"', text)) <= names
    for name in ("../web.py", "..%2Fweb.py", "%2e%2e%2fweb.py", "x.js"):
        assert ask(served, f"/page/{name}")[0] == 404
    assert b"<script>" not in index


# In a browser -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if BROWSER is None:
        pytest.skip("no browser: apt-get install chromium")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    with opened(browser, served.url) as found:
        yield found


class opened:
    """A page in a context of its own, which complains of nothing and asks nobody else."""

    def __init__(self, browser: Any, url: str, **how: Any) -> None:
        self.context, self.url = browser.new_context(viewport={"width": 1280, "height": 800}, **how), url
        self.context.set_default_timeout(30_000)
        self.wrong = list[str]()

    def __enter__(self) -> Any:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        known = ("status of 4", "ERR_INTERNET_DISCONNECTED")  # the browser notes what the page says in its own words
        page.on("console", lambda said: None if said.type != "error" or any(word in said.text for word in known)
                else self.wrong.append(said.text))
        page.on("request", lambda asked: None if asked.url.startswith((self.url, "data:", "blob:")) else self.wrong.append(asked.url))
        page.goto(self.url)
        return page

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.context.close()
        assert kind is not None or not self.wrong


def expect(what: Any) -> Any:
    from playwright.sync_api import expect
    expect.set_options(timeout=30_000)
    return expect(what)


def files(page: Any, file: bytes, name: str = "red.png", kind: str = "image/png") -> Any:
    """What a browser hands over with a drop or a paste."""
    return page.evaluate_handle("""([data, name, type]) => {
        const held = new DataTransfer();
        held.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, {type}));
        return held;
    }""", [base64.b64encode(file).decode(), name, kind])


def test_a_conversation_with_pictures_in_and_out_by_keyboard_alone(page: Any, served: Served) -> None:
    expect(page.locator("#chat-say")).to_be_focused()
    forming = page.locator(".turn.model .frame.forming")
    page.keyboard.type(ASKED)
    page.keyboard.press("Enter")
    expect(page.locator(".turn.model footer")).to_have_count(1)
    expect(page.locator(".turn.model .picture img")).to_have_count(1)
    expect(forming).to_have_count(0)
    drawn = page.locator(".turn.model .picture img").get_attribute("src")
    page.evaluate("(held) => dispatchEvent(new ClipboardEvent('paste', {clipboardData: held}))", files(page, RED))
    expect(page.locator(".shelf img")).to_have_count(1)
    page.keyboard.type("what colour?")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    expect(page.locator(".turn.model footer")).to_have_count(2)
    expect(page.locator(".turn.user img")).to_have_attribute("src", data_url(RED))
    turns = asked.value.post_data_json["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert {"type": "image_url", "image_url": {"url": drawn}} in turns[1]["parts"]
    assert turns[2]["content"] == [{"type": "image_url", "image_url": {"url": data_url(RED)}}, {"type": "text", "text": "what colour?"}]
    page.get_by_role("button", name="Again").last.click()
    expect(page.locator(".turn.model footer")).to_have_count(2)
    expect(page.locator(".turn.user")).to_have_count(2)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_what_is_said_is_text_and_never_a_page(page: Any) -> None:
    page.fill("#chat-say", "<img src=x onerror=alert(1)><b>bold</b>")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user p")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator(".turn.model footer")).to_have_count(1)
    assert page.locator(".turn b").count() == page.locator(".turn.user img").count() == 0


def test_pictures_are_dropped_chosen_and_taken_back_and_other_files_are_not(page: Any) -> None:
    page.locator("#chat-say").wait_for()
    page.dispatch_event("body", "dragenter", {"dataTransfer": files(page, RED)})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": files(page, RED)})
    expect(page.locator("#drop")).to_be_hidden()
    page.set_input_files("#chat-file", {"name": "other.png", "mimeType": "image/png", "buffer": RED})
    expect(page.locator(".shelf img")).to_have_count(2)
    page.get_by_role("button", name="Take the picture back").first.click()
    expect(page.locator(".shelf img")).to_have_count(1)
    page.dispatch_event("body", "drop", {"dataTransfer": files(page, b"hello", "hello.txt", "text/plain")})
    expect(page.get_by_role("alert")).to_have_text("hello.txt is no picture")
    page.dispatch_event("body", "drop", {"dataTransfer": files(page, b"hello", "hello.png")})
    expect(page.locator(".shelf img")).to_have_count(2)
    page.locator("#chat-say").press("Enter")
    expect(page.get_by_role("alert").last).to_contain_text("does not decode as a picture")
    expect(page.locator("#chat-say")).to_have_value("describe the picture")  # it was not answered: the words are back


def test_sliders_shape_the_pictures_that_the_engine_would_draw(page: Any, served: Served) -> None:
    page.keyboard.press("Alt+2")
    expect(page.locator("#draw-prompt")).to_be_focused()
    expect(page.locator("#draw-negative")).to_be_disabled()
    page.keyboard.type("a red star")
    page.fill("#draw-guidance + input", "4")
    page.fill("#draw-n + input", "2")
    page.fill("#draw-temperature + input", "0.8")
    page.fill("#draw-top-k + input", "20")
    page.fill("#draw .seed input", "11")
    page.fill("#draw-negative", "a blue circle")
    page.locator("#draw-prompt").press("Enter")
    expect(page.locator("#draw .tools a")).to_have_count(2)
    sources = [one.get_attribute("src") for one in page.locator("#draw .picture img").all()]
    codes = served.engine.draw(["a red star"], 2, 4.0, Sampling(temperature=0.8, top_k=20), 11, negative="a blue circle")[0]
    assert sources == [data_url(to_png(one)) for one in to_uint8(served.engine.pictures(codes))]
    expect(page.locator("#draw .run small")).to_have_text(
        "guidance 4 · temperature 0.8 · top-k 20 · seed 11 · without a blue circle")
    page.get_by_role("button", name="To chat").first.click()
    expect(page.locator(".shelf img")).to_have_attribute("src", sources[0])


def test_guidance_is_seen_side_by_side_from_the_same_random_numbers(page: Any, served: Served) -> None:
    page.click("#tab-guidance")
    page.fill("#guidance-strengths", "1, 5, nonsense, 1000")
    page.fill("#guidance-columns + input", "3")
    page.fill("#guidance .seed input", "7")
    page.fill("#guidance-prompt", "two green stars")
    page.locator("#guidance-prompt").press("Enter")
    expect(page.locator("#guidance .tools a")).to_have_count(6)
    sources = [one.get_attribute("src") for one in page.locator("#guidance .picture img").all()]
    how = Sampling(temperature=served.service.settings.image_temperature)
    codes = [served.engine.draw(["two green stars"], 3, guidance, how, 7)[0] for guidance in (1.0, 5.0)]
    assert sources == [data_url(to_png(one)) for row in codes for one in to_uint8(served.engine.pictures(row))]
    assert page.locator("#guidance tbody th").all_text_contents() == ["1", "5"]


def test_codes_are_looked_at_and_exchanged_by_keyboard(page: Any, served: Served) -> None:
    page.click("#tab-draw")
    page.fill("#draw-prompt", "a red star")
    page.fill("#draw-n + input", "1")
    page.locator("#draw-prompt").press("Enter")
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator("#tokens .cell")).to_have_count(9)
    expect(page.locator("#tokens-words")).to_have_value("a red star")
    page.locator("#tokens .cell").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#tokens aside h3")).to_have_text("Row 2, column 2")
    before = page.locator("#tokens .board img").get_attribute("src")
    other = page.locator("#tokens .other:enabled").first
    code = other.locator("span").first.text_content()
    other.press("Enter")
    expect(page.locator("#tokens .cell.at")).to_have_text(code)
    expect(page.locator("#tokens .board img")).not_to_have_attribute("src", before)
    page.get_by_role("button", name="Take back").click()
    expect(page.locator("#tokens .board img")).to_have_attribute("src", before)
    for colour in ("gain", "codes", "none", "probability"):
        page.get_by_label("Colour").select_option(colour)
        expect(page.locator(f'#tokens .cell[data-kind="{colour}"]')).to_have_count(9)
    page.get_by_label("Book").select_option("1")
    expect(page.locator("#tokens .cell")).to_have_count(9)
    expect(page.locator("#tokens .summary")).to_contain_text("18 codes of 48")


def test_a_server_that_is_silent_or_gone_is_said_to_be(page: Any) -> None:
    page.click("#tab-draw")
    page.route("**/v1/images/generations", lambda route: None)
    page.fill("#draw-prompt", "a red star")
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        page.locator("#draw-prompt").press("Enter")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.locator("#draw-prompt").press("Enter")  # twice is not enough to stop
        page.locator("#draw-n + input").press("Enter")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        stop()
        expect(page.get_by_role("button", name="Draw")).to_be_visible()
    assert page.get_by_role("alert").count() == 0
    page.unroute("**/v1/images/generations")
    page.context.set_offline(True)
    page.locator("#draw-prompt").press("Enter")
    expect(page.get_by_role("alert")).to_have_text("the server does not answer: is it still running?")
    page.context.set_offline(False)
    page.locator("#draw-prompt").press("Enter")
    expect(page.locator("#draw .tools a").first).to_be_visible()


def test_it_is_light_or_dark_as_the_reader_wants(browser: Any, served: Served) -> None:
    def light(page: Any) -> bool:
        colour = page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
        return int(re.findall(r"\d+", colour)[0]) > 128

    with opened(browser, served.url, color_scheme="dark") as page:
        assert not light(page)
        page.click("#theme")  # auto, then light
        assert light(page)
        page.reload()
        assert light(page)
        page.click("#theme")
        assert not light(page)


def test_tabs_follow_the_arrows_and_a_phone_has_room(browser: Any, served: Served) -> None:
    with opened(browser, served.url) as page:
        page.set_viewport_size({"width": 390, "height": 800})
        page.locator("#chat-say").wait_for()
        page.locator("#tab-chat").focus()
        for name in ("draw", "guidance", "tokens", "chat"):
            page.keyboard.press("ArrowRight")
            expect(page.locator(f"#tab-{name}")).to_be_focused()
            expect(page.locator(f"#{name}")).to_be_visible()
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_a_key_is_asked_for_once_and_only_where_one_is_wanted(browser: Any, served: Served, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY + "\n")
    settings = Settings(api_keys=tmp_path / "keys")
    with serving.serving(served.engine, settings) as locked, opened(browser, locked.url) as page:
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_label("API key")).to_have_value("")
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.fill("#chat-say", ASKED)
        page.keyboard.press("Enter")
        expect(page.locator(".turn.model footer")).to_have_count(1)
        page.reload()
        expect(page.locator("#chat-say")).to_be_focused()
