"""A chat in the terminal: text and pictures in, text and pictures out.

A line that begins with `/` is for the program, everything else is for the model. Text comes as it is said. A drawn picture is always
saved, and shown where the output is a terminal (`mmllm.serve.screen`); from a pipe, plain lines are read and written. Ctrl-C ends an
answer, Ctrl-D the chat.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.chat import DESCRIBE_REQUESTS
from data.images import fitted, to_tensor, to_uint8
from data.tokens import sizes_of
from mmllm.generate.engine import Engine, Plan
from mmllm.generate.sample import Sampling
from mmllm.serve.screen import Protocol, attributes, draw, half_blocks, protocol
from mmllm.serve.transcript import Event, Line, Transcript, Words

__all__ = ["chat", "half_blocks", "main"]

HELP = """/image FILE      attach a picture to what you say next      /seed N          random numbers of what follows
/again           another answer, with the next seed         /guidance G      how closely a picture follows the words
/new             forget the conversation                    /temperature T   of pictures; 0 takes the likeliest
/history         what was said                              /save FILE       the conversation as Markdown
/help            this                                       /quit            end; so does Ctrl-D, and Ctrl-C ends an answer"""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
REMEMBERED = 1_000
"""Typed lines that the next chat can be asked for again, by the arrow keys."""


@dataclass
class Talk:
    """A conversation and how it goes on."""

    plan: Plan
    seed: int
    turns: list[dict[str, Any]] = field(default_factory=list)
    """As `data.chat` takes them; a picture's part also has the `path` of its file."""
    attached: list[dict[str, Any]] = field(default_factory=list)


def main(model: Path, out: Path = Path("pictures"), seed: int = 0, guidance: float = 1.0, temperature: float = 0.4,
         max_text: int = 256) -> None:
    """Chat with a tuned model folder; drawn pictures go to `out`. Errors: ValueError, FileNotFoundError."""
    engine = Engine.load(model)
    if not engine.folder.chat:
        raise ValueError(f"{model} was not tuned on conversations: give the `hf` folder of an `mmllm sft` run, "
                         "or use `mmllm generate` and `mmllm describe`")
    plan = Plan(image=Sampling(temperature=temperature), guidance=guidance, max_text=max_text, max_pictures=1)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    how = protocol(os.environ, attributes) if terminal else None
    if terminal:
        print(f"{model}. Say something, or /help.")
    chat(engine, _typed() if terminal else sys.stdin, sys.stdout, out, plan, seed, how)


def chat(engine: Engine, lines: Iterable[str], screen: TextIO, out: Path, plan: Plan, seed: int = 0, how: Protocol | None = None) -> None:
    """The conversation, line by line, until the lines end or one says /quit. how: pictures are shown, if they are."""
    talk = Talk(plan, seed)
    for line in lines:
        line = line.strip()
        command, _, argument = line.partition(" ")
        if command == "/quit":
            break
        try:
            if line.startswith("/"):
                _obey(engine, talk, command, argument.strip(), screen, out, how)
            elif line or talk.attached:
                said = [*talk.attached, {"type": "text", "text": line or DESCRIBE_REQUESTS[0]}]
                _answer(engine, talk, [*talk.turns, {"role": "user", "content": said}], screen, out, how)
                talk.attached = []
        except (ValueError, OSError) as error:  # of this line alone: the conversation goes on
            print(f"error: {error}", file=screen)
        except KeyboardInterrupt:
            print("\x1b[0m\n(stopped, and not remembered)", file=screen)
        screen.flush()


def _obey(engine: Engine, talk: Talk, command: str, argument: str, screen: TextIO, out: Path, how: Protocol | None) -> None:
    """A line for the program. Errors: ValueError, OSError."""
    if command == "/help":
        print(HELP, file=screen)
    elif command == "/new":
        talk.turns, talk.attached = [], []
    elif command == "/image":
        path = Path(argument).expanduser()
        codes = engine.codes(to_tensor(np.asarray(fitted(path, sizes_of(engine.visual))))[None])[0]
        talk.attached.append({"type": "image", "codes": codes, "path": path})
        screen.write(draw(_painted(engine, codes), how or "none"))
    elif command == "/seed":
        talk.seed = int(argument)
    elif command == "/guidance":
        talk.plan = replace(talk.plan, guidance=float(argument))
    elif command == "/temperature":
        talk.plan = replace(talk.plan, image=replace(talk.plan.image, temperature=float(argument)))
    elif command == "/again":
        if not talk.turns:
            raise ValueError("nothing was said yet that could be answered again")
        talk.seed += 1
        _answer(engine, talk, talk.turns[:-1], screen, out, how)
    elif command == "/history":
        screen.writelines(_told(talk.turns, None))
    elif command == "/save":
        if not argument:
            raise ValueError("/save needs a file to write: /save talk.md")
        path = Path(argument).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_told(talk.turns, path.parent)))
        print(f"[conversation: {path}]", file=screen)
    else:
        print(f"there is no command {command}; /help lists them", file=screen)


# Answers ----------------------------------------------------------------------------------------------------------

def _answer(engine: Engine, talk: Talk, asked: list[dict[str, Any]], screen: TextIO, out: Path, how: Protocol | None) -> None:
    """Say and show what the model answers; the conversation is then what was asked and that."""
    reply, ids, open_line = list[dict[str, Any]](), list[int](), False
    for new, event in _events(engine, asked, talk):
        ids += new
        if isinstance(event, Words):
            screen.write(_plain(event.text))
            open_line = True
        elif isinstance(event, Line):
            if open_line:
                screen.write("\n")
                open_line = False
            if how is not None:
                screen.write("\r\x1b[K" if event.whole else f"\rdrawing {event.number + 1} of {event.grid[0]} lines")
            if event.whole:
                reply.append({"path": _saved(picture := _painted(engine, event.codes), out)})
                screen.write(f"{draw(picture, how or 'none')}[picture: {reply[-1]['path']}]\n")
        screen.flush()
    parts = engine.parts_of(ids)
    if open_line or not parts:
        screen.write("\n")
    paths = iter(reply)
    talk.turns = [*asked, {"role": "assistant", "content": [part | next(paths) if part["type"] == "image" else part for part in parts]}]


def _events(engine: Engine, turns: list[dict[str, Any]], talk: Talk) -> Iterator[tuple[list[int], Event | None]]:
    """(ids that are new, what they tell). Errors: ValueError for a conversation that is too long."""
    request = engine.chat_request(turns, talk.plan, talk.seed)
    batch = engine.batching(2)
    batch.submit(request)
    transcript = Transcript(engine.folder.vocab, engine.folder.text)
    while not batch.idle:
        for one in batch.step():
            yield [one.id], None
            for event in transcript.take(one.id, one.reason):
                yield [], event


def _painted(engine: Engine, codes: NDArray[np.int32]) -> Image.Image:
    return Image.fromarray(to_uint8(engine.pictures(codes)))


def _saved(picture: Image.Image, out: Path) -> Path:
    """Under the next free number."""
    out.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdecimal()), default=0)
    path = out / f"{number:04d}.png"
    picture.save(path)
    return path


# Lines ------------------------------------------------------------------------------------------------------------

def _plain(text: str) -> str:
    """Text that a terminal takes for text: what a model says must not move its cursor or write its clipboard."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _told(turns: list[dict[str, Any]], beside: Path | None) -> Iterator[str]:
    """The conversation in lines; as Markdown with pictures as seen from a folder, if one is given."""
    for turn in turns:
        yield f"{'**' * (beside is not None)}{'you' if turn['role'] == 'user' else 'model'}{'**' * (beside is not None)}\n"
        for part in turn["content"]:
            if part["type"] == "text":
                yield f"{_plain(part['text'])}\n"
            else:
                yield f"[picture: {part['path']}]\n" if beside is None else f"![picture](<{os.path.relpath(part['path'], beside)}>)\n"
        yield "\n"


def _typed() -> Iterator[str]:
    """Lines typed at a prompt, until Ctrl-D, or Ctrl-C with nothing asked; what was typed is remembered between chats."""
    readline = importlib.import_module("readline")  # gives input() line editing and history
    file = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "mmllm/chat_history"
    try:
        readline.read_history_file(file)
    except OSError:  # there was no chat before
        readline.clear_history()
    readline.set_history_length(REMEMBERED)
    try:
        while True:
            yield input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:  # a home that cannot be written to is no reason not to chat
            print(f"what was typed is not remembered: {error}", file=sys.stderr)
