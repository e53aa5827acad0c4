"""A chat in the terminal: text and pictures in, text and pictures out.

A line that begins with `/` is for the program, everything else is for the model. A drawn picture is saved, and shown in
half blocks where the output is a terminal; from a pipe, plain lines are read and written.
"""

import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from data.chat import DESCRIBE_REQUESTS
from data.images import fitted, to_tensor, to_uint8
from data.tokens import sizes_of
from mmllm.generate.engine import Engine, Plan
from mmllm.generate.sample import Sampling

HELP = """/image FILE    attach a picture to what you say next      /seed N        random numbers of what follows
/new           forget the conversation                    /guidance G    how closely a picture follows the words
/help          this                                       /quit          end"""
COLUMNS = 32
"""Widest that a picture is shown, in characters."""


def main(model: Path, out: Path = Path("pictures"), seed: int = 0, guidance: float = 1.0, temperature: float = 0.4,
         max_text: int = 256) -> None:
    """Chat with a tuned model folder; drawn pictures go to `out`. Errors: ValueError, FileNotFoundError."""
    engine = Engine.load(model)
    if not engine.folder.chat:
        raise ValueError(f"{model} was not tuned on conversations: give the `hf` folder of an `mmllm sft` run, "
                         "or use `mmllm generate` and `mmllm describe`")
    plan = Plan(image=Sampling(temperature=temperature), guidance=guidance, max_text=max_text, max_pictures=1)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        importlib.import_module("readline")  # gives input() line editing and history
        print(f"{model}. Say something, or /help.")
    chat(engine, _typed() if terminal else sys.stdin, sys.stdout, out, plan, seed)


def chat(engine: Engine, lines: Iterable[str], screen: TextIO, out: Path, plan: Plan, seed: int = 0) -> None:
    """The conversation, line by line, until the lines end or one says /quit."""
    turns: list[dict[str, Any]] = []
    attached: list[dict[str, Any]] = []
    for line in lines:
        line = line.strip()
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            if command == "/quit":
                break
            if command == "/help":
                print(HELP, file=screen)
            elif command == "/new":
                turns, attached = [], []
            elif command == "/image":
                picture = fitted(Path(argument).expanduser(), sizes_of(engine.visual))
                codes = engine.codes(to_tensor(np.asarray(picture))[None])[0]
                attached.append({"type": "image", "codes": codes})
            elif command == "/seed":
                seed = int(argument)
            elif command == "/guidance":
                plan = replace(plan, guidance=float(argument))
            elif line.startswith("/"):
                print(f"there is no command {command}; /help lists them", file=screen)
            elif line or attached:
                said = [*attached, {"type": "text", "text": line or DESCRIBE_REQUESTS[0]}]
                reply = engine.chat([*turns, {"role": "user", "content": said}], plan, seed)
                turns += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
                attached = []
                for part in reply:
                    print(part["text"] if part["type"] == "text" else _shown(engine, part["codes"], out, screen),
                          file=screen)
        except (ValueError, OSError) as error:  # of this line alone: the conversation goes on
            print(f"error: {error}", file=screen)
        screen.flush()


def _typed() -> Iterable[str]:
    """Lines typed at a prompt, until Ctrl-D or Ctrl-C."""
    try:
        while True:
            yield input("> ")
    except (EOFError, KeyboardInterrupt):
        print()


def _shown(engine: Engine, codes: np.ndarray, out: Path, screen: TextIO) -> str:
    """Save a picture under the next free number; → what to print for it."""
    picture = Image.fromarray(to_uint8(engine.pictures(codes)))
    out.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.stem) for p in out.glob("*.png") if p.stem.isdecimal()), default=0)
    path = out / f"{number:04d}.png"
    picture.save(path)
    blocks = f"{half_blocks(picture)}\n" if screen.isatty() and "NO_COLOR" not in os.environ else ""
    return f"{blocks}[picture: {path}]"


def half_blocks(picture: Image.Image, columns: int = COLUMNS) -> str:
    """A picture as lines of ▀, whose upper half has the foreground's colour and whose lower half the background's."""
    width = min(columns, picture.width)
    height = max(2, round(picture.height * width / picture.width / 2) * 2)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    lines: list[str] = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
                 for a, b in zip(upper, lower, strict=True)]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
