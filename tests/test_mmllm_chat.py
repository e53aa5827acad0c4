"""The terminal: pictures in the codes that terminals take, and a chat driven through a pseudo-terminal."""

import base64
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
from PIL import Image

from data.images import to_uint8
from mmllm.generate.engine import Engine, Plan
from mmllm.generate.sample import Sampling
from mmllm.serve.chat import chat
from mmllm.serve.screen import CHUNK, Protocol, draw, iterm2, kitty, protocol, sixel

ROOT = Path(__file__).parent.parent


def noise(side: int = 24, colours: int = 200) -> Image.Image:
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (colours, 3), np.uint8)
    return Image.fromarray(palette[rng.integers(0, colours, (side, side + 5))])


# Pictures ---------------------------------------------------------------------------------------------------------

def unsixel(text: str) -> np.ndarray:
    """Sixels → percent of colours [H, W, 3], by the manual."""
    body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.DOTALL)
    assert body
    width, height = int(body[1]), int(body[2])
    shown, colours = np.full((height, width, 3), -1), dict[int, list[int]]()
    x = y = colour = 0
    for number, given, count, letter, move in re.findall(r"#(\d+)((?:;\d+)*)|(?:!(\d+))?([?-~])|([$-])", body[3]):
        if number:
            colour = int(number)
            if given:
                colours[colour] = [int(value) for value in given.split(";")[2:]]
        elif letter:
            for _ in range(int(count or 1)):
                for bit in range(6):
                    if ord(letter) - 63 >> bit & 1:
                        shown[y + bit, x] = colours[colour]
                x += 1
        else:
            x, y = 0, y + 6 * (move == "-")
    return shown


def test_sixels_are_the_picture_in_every_pixel() -> None:
    picture = noise()
    shown = unsixel(sixel(picture))
    times = shown.shape[0] // picture.height
    assert times == 8 and shown.min() >= 0
    wanted = np.asarray(picture, float) * 100 / 255
    assert np.abs(shown[::times, ::times] - wanted).max() <= 0.5 + 1e-9
    assert (shown.reshape(picture.height, times, picture.width, times, 3) == shown[::times, None, ::times, None]).all()


def test_kitty_gets_a_png_in_pieces() -> None:
    picture = noise(128)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(picture))
    assert len(pieces) > 2 and all(len(data) <= CHUNK and len(data) % 4 == 0 for _, data in pieces)
    assert pieces[0][0].startswith("a=T,f=100,q=2,") and [head[-3:] for head, _ in pieces] == ["m=1"] * (len(pieces) - 1) + ["m=0"]
    file = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    assert (np.asarray(file)[::file.height // 128, ::file.height // 128] == np.asarray(picture)).all()


def test_iterm2_gets_a_file_of_the_size_it_is_told() -> None:
    head, data = iterm2(noise()).removesuffix("\a").split(":")
    file = base64.b64decode(data)
    assert head.startswith("\x1b]1337;File=inline=1;") and f"size={len(file)};" in head and Image.open(io.BytesIO(file)).format == "PNG"


@pytest.mark.parametrize(("environment", "answer", "found"), [
    ({"TERM": "xterm-kitty"}, "", "kitty"),
    ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "", "kitty"),
    ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "", "iterm2"),
    ({"TERM": "tmux-256color", "TMUX": "/tmp/x", "KITTY_WINDOW_ID": "1"}, "", "blocks"),
    ({"TERM": "foot"}, "\x1b[?62;4;22c", "sixel"),
    ({"TERM": "xterm"}, "\x1b[?64;22c", "blocks"),
    ({"TERM": "xterm"}, "", "blocks"),
    ({"TERM": "xterm-kitty", "NO_COLOR": ""}, "", "none"),
    ({"TERM": "dumb"}, "", "none"),
    ({"TERM": "dumb", "MMLLM_PICTURES": "sixel"}, "", "sixel"),
])
def test_a_terminal_gets_what_it_takes(environment: dict[str, str], answer: str, found: Protocol) -> None:
    assert protocol(environment, lambda: answer) == found


def test_a_wish_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="MMLLM_PICTURES=ascii: pictures are shown as one of none, blocks, kitty"):
        protocol({"MMLLM_PICTURES": "ascii"}, lambda: "")


def test_nothing_is_drawn_where_nothing_is_shown() -> None:
    assert draw(noise(), "none") == "" and draw(noise(), "blocks").endswith("\n")


# Chats ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return serving.drawer(tmp_path_factory.mktemp("chat") / "model")


PLAN = Plan(image=Sampling(temperature=0.5), max_text=24, max_pictures=1)
ASKED = "draw a red star above two"


def test_what_is_said_is_what_the_engine_says_without_its_control_codes(engine: Engine, tmp_path: Path) -> None:
    turns, screen = list[dict[str, Any]](), io.StringIO()
    for words in (ASKED, "how many?"):
        turns.append({"role": "user", "content": words})
        turns.append({"role": "assistant", "content": engine.chat(turns, PLAN, 3)})
    chat(engine, ["/seed 3", ASKED, "how many?"], screen, tmp_path, PLAN)
    wanted = [part for turn in turns[1::2] for part in turn["content"]]
    said, at = screen.getvalue(), 0
    for part in wanted:
        if part["type"] == "text":
            plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", part["text"])
            at = said.index(plain, at) + len(plain)
    assert "\x1b" in str(wanted) or "\\x" in str(wanted)  # the model says such things, or this shows nothing
    assert not {letter for letter in said if unicodedata.category(letter) == "Cc"} - {"\n", "\t"}
    painted = [to_uint8(engine.pictures(part["codes"])) for part in wanted if part["type"] == "image"]
    files = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))]
    assert len(painted) == said.count("[picture: ") > 0 and all(map(np.array_equal, painted, files))


def test_a_conversation_is_saved_with_its_pictures(engine: Engine, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "mine.png")
    screen = io.StringIO()
    lines = [ASKED, f"/image {tmp_path}/mine.png", "what colour?", "/history", f"/save {tmp_path}/talks/one.md", "/save"]
    chat(engine, lines, screen, tmp_path / "out", PLAN)
    text = (tmp_path / "talks/one.md").read_text()
    shown = re.findall(r"!\[picture\]\(<(.*)>\)", text)
    assert "../mine.png" in shown and all((tmp_path / "talks" / name).is_file() for name in shown) and len(shown) > 1
    assert text.count("**you**") == text.count("**model**") == 2
    assert screen.getvalue().count("what colour?") == 1 and "error: /save needs a file" in screen.getvalue()


def test_another_answer_takes_the_place_of_the_last(engine: Engine, tmp_path: Path) -> None:
    screen = io.StringIO()
    chat(engine, ["/again", ASKED, "/again", f"/save {tmp_path}/one.md"], screen, tmp_path, PLAN)
    assert (tmp_path / "one.md").read_text().count("**model**") == 1
    assert screen.getvalue().startswith("error: nothing was said yet")


class Terminal:
    """A program at the other end of a pseudo-terminal."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.side, other = pty.openpty()
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env={**os.environ, **environment}, cwd=ROOT,
                                        start_new_session=True)
        os.close(other)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())

    def until(self, text: str, limit_s: float = 60) -> str:
        """→ what was written up to there, which is not looked at again."""
        end = time.monotonic() + limit_s
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen[-2000:]!r}"
            if select.select([self.side], [], [], 0.1)[0]:
                self.seen += os.read(self.side, 65_536).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before


@pytest.fixture
def terminal(engine: Engine, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts `mmllm chat` in a terminal of some kind."""
    started = list[Terminal]()

    def start(**environment: str) -> Terminal:
        command = [sys.executable, "-m", "mmllm.cli", "chat", str(engine.folder.path), "--out", str(tmp_path / "out")]
        kind = {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path / "state"), "OMP_NUM_THREADS": "1", **environment}
        started.append(Terminal(command, kind))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.side)


def test_a_person_chats_sees_pictures_and_finds_the_lines_again(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    first = terminal()
    first.until("\x1b[c")  # it asks what the terminal can do
    first.type("\x1b[?62;4;22c")  # sixels
    first.until("> ")
    first.type(f"{ASKED}\r")
    drawn = first.until("[picture: ")
    assert "drawing 1 of 3 lines" in drawn and "\x1bP0;1q" in drawn
    path = first.until("]")
    assert path == str(tmp_path / "out" / "0001.png") and Image.open(path).size == (24, 24)
    first.until("> ")
    first.type("/image nowhere.png\r")
    first.until("error: ")
    first.until("> ")
    first.type("\x04")  # Ctrl-D
    assert first.process.wait(30) == 0

    second = terminal(MMLLM_PICTURES="blocks")
    second.until("> ")
    second.type("\x1b[A\x1b[A\r")  # two lines back
    second.until(ASKED)
    assert "▀" in second.until("[picture: ") and "0002.png" in second.until("]")
    second.until("> ")
    second.type("/quit\r")
    assert second.process.wait(30) == 0
