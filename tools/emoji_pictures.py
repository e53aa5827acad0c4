"""Glyphs of Debian's fonts-noto-color-emoji as pictures with their Unicode names as captions: x.png + x.txt.

    apt-get install fonts-noto-color-emoji
    python tools/emoji_pictures.py emoji && mmllm quickstart --data emoji --out runs/emoji
"""

import argparse
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIDE = 109
"""Pixels: the only size that the font's bitmaps have."""
BLOCKS = ((0x203C, 0x3300), (0x1F000, 0x1FB00))
MODIFIERS = range(0x1F3FB, 0x1F400)


def glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The glyph in colour in the middle of a white square, or None where the font has none."""
    left, top, right, bottom = font.getbbox(character)
    if right - left < 20 or bottom - top < 20:
        return None
    side = 136
    picture = Image.new("RGB", (side, side), "white")
    at = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
    ImageDraw.Draw(picture).text(at, character, font=font, embedded_color=True)
    colours = picture.getcolors(side * side)
    return picture if colours is not None and len(colours) > 8 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--font", type=Path, default=FONT, help="the font file")
    arguments = parser.parse_args()
    if not arguments.font.is_file():
        raise SystemExit(f"there is no font {arguments.font}: apt-get install fonts-noto-color-emoji, or give --font")
    font = ImageFont.truetype(str(arguments.font), SIDE)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for code in (code for first, end in BLOCKS for code in range(first, end) if code not in MODIFIERS):
        name = unicodedata.name(chr(code), "").lower()
        if not name or (picture := glyph(chr(code), font)) is None:
            continue
        path = arguments.folder / f"u{code:05x}"
        picture.save(path.with_suffix(".png"))
        path.with_suffix(".txt").write_text(name + "\n")
        written += 1
    print(f"{written} pictures in {arguments.folder}")


if __name__ == "__main__":
    main()
