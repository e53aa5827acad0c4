"""Pictures in a terminal: as pixels where it takes them, in half blocks of 24-bit colour elsewhere.

    kitty     PNG in escape codes: kitty, Ghostty, Konsole     the kitty graphics protocol, "Transferring pixel data"
    iterm2    a file in an escape code: iTerm2, WezTerm, mintty     iTerm2's inline images protocol
    sixel     six rows of pixels a line, in up to 256 colours: foot, mlterm, Windows Terminal     VT330/VT340 manual, chapter 14
    blocks    ▀ in two colours

Letters: H W pixels.
"""

import base64
import io
import os
import select
import sys
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Literal, get_args

import numpy as np
from PIL import Image

Protocol = Literal["none", "blocks", "kitty", "iterm2", "sixel"]
COLUMNS = 32
"""Widest that a picture is shown, in characters."""
SIDE = 256
"""A small picture is enlarged to this many pixels, so that its own stay sharp."""
ANSWER_S = 0.2
"""How long a terminal is waited for that does not say what it can do."""
CHUNK = 4096  # bytes of base64 in one of kitty's escape codes


def protocol(environment: Mapping[str, str], ask: Callable[[], str]) -> Protocol:
    """What a terminal takes. ask: its answer to "Primary Device Attributes". Errors: ValueError for a wish that nobody knows."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    wish = environment.get("MMLLM_PICTURES", "")
    if wish:
        found = next((known for known in get_args(Protocol) if known == wish), None)
        if found is None:
            raise ValueError(f"MMLLM_PICTURES={wish}: pictures are shown as one of {', '.join(get_args(Protocol))}")
        return found
    if "NO_COLOR" in environment or term in ("", "dumb"):
        return "none"
    if not {"TMUX", "STY"} & set(environment):  # those show what stands in their own screen, and pass no pixels on
        if term in ("xterm-kitty", "xterm-ghostty") or {"KITTY_WINDOW_ID", "KONSOLE_VERSION"} & set(environment):
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    attributes = ask().removeprefix("\x1b[?").removesuffix("c").split(";")
    return "sixel" if "4" in attributes[1:] else "blocks"


def attributes() -> str:
    """What the terminal answers to `CSI c`, such as `CSI ? 62 ; 4 ; 22 c`; nothing if it does not, or where there is none."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return ""
    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (OSError, ValueError, termios.error):
        return ""
    answer = ""
    try:
        tty.setcbreak(keyboard)
        os.write(sys.stdout.fileno(), b"\x1b[c")
        while not answer.endswith("c") and select.select([keyboard], [], [], ANSWER_S)[0]:
            answer += os.read(keyboard, 64).decode("latin-1")
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
    return answer if answer.startswith("\x1b[?") else ""


def draw(picture: Image.Image, how: Protocol) -> str:
    """What to print for a picture, its line's end included; nothing for "none"."""
    paint = {"none": lambda picture: "", "blocks": half_blocks, "kitty": kitty, "iterm2": iterm2, "sixel": sixel}[how]
    return f"{drawn}\n" if (drawn := paint(picture)) else ""


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


def kitty(picture: Image.Image) -> str:
    """a=T shows what f=100, a PNG, holds; q=2 keeps the terminal from answering; m=1 says that more comes."""
    data = base64.b64encode(_png(picture)).decode()
    pieces = [data[at:at + CHUNK] for at in range(0, len(data), CHUNK)]
    heads = [f"a=T,f=100,q=2,c={COLUMNS}," if number == 0 else "" for number in range(len(pieces))]
    return "".join(f"\x1b_G{head}m={int(number < len(pieces) - 1)};{piece}\x1b\\"
                   for number, (head, piece) in enumerate(zip(heads, pieces, strict=True)))


def iterm2(picture: Image.Image) -> str:
    file = _png(picture)
    return f"\x1b]1337;File=inline=1;size={len(file)};width={COLUMNS};preserveAspectRatio=1:{base64.b64encode(file).decode()}\a"


def sixel(picture: Image.Image) -> str:
    """A character is 63 + the bits of six pixels of one colour, the top one lowest; `$` goes back to the line's start, `-` to the next
    line, `!n` repeats."""
    flat = _enlarged(picture).quantize(256, dither=Image.Dither.NONE)
    index = np.asarray(flat)  # [H, W]
    height, width = index.shape
    palette = np.array(flat.getpalette(), np.int64).reshape(-1, 3)
    out = [f'\x1bP0;1q"1;1;{width};{height}']
    out += [f"#{number};2;" + ";".join(str(round(value * 100 / 255)) for value in palette[number]) for number in np.unique(index)]
    for top in range(0, height, 6):
        band = index[top:top + 6]
        weights = 1 << np.arange(len(band))[:, None]
        for number in np.unique(band):
            bits = ((band == number) * weights).sum(0)  # [W]
            runs = [(chr(63 + value), len(list(group))) for value, group in groupby(bits.tolist())]
            out.append(f"#{number}" + "".join(f"!{count}{letter}" if count > 3 else letter * count for letter, count in runs) + "$")
        out.append("-")
    return "".join(out) + "\x1b\\"


def _enlarged(picture: Image.Image) -> Image.Image:
    times = max(1, SIDE // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    _enlarged(picture).save(out, "png")
    return out.getvalue()
