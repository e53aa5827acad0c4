"""Contact sheets from a quick start's examples, for a README: what was drawn, described and rebuilt.

    python tools/report_pictures.py runs/quickstart recipes/results/quickstart
"""

import argparse
import base64
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LINE = 128, 14, 13


def picture(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png))).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def sheet(cells: Sequence[tuple[list[str], str]], columns: int, lines: int) -> Image.Image:
    """Cells of pictures (side by side) with words below, `columns` a row."""
    wide = max(len(pictures) for pictures, _ in cells)
    width, height = wide * SIDE + GAP, SIDE + GAP + lines * LINE
    page = Image.new("RGB", (columns * width + GAP, -(-len(cells) // columns) * height + GAP), "white")
    font = ImageFont.load_default(11)
    for number, (pictures, words) in enumerate(cells):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        for at, png in enumerate(pictures):
            page.paste(picture(png), (left + at * SIDE, top))
            ImageDraw.Draw(page).rectangle((left + at * SIDE, top, left + (at + 1) * SIDE - 1, top + SIDE - 1), outline="#bbbbbb")
        text = "\n".join(line for part in words.split("\n") for line in textwrap.wrap(part, wide * 23))
        ImageDraw.Draw(page).multiline_text((left, top + SIDE + 2), text, fill="black", font=font, spacing=1)
    return page


def mark(right: bool | None) -> str:
    return "" if right is None else "" if right else "WRONG: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="run folder of a quick start")
    parser.add_argument("out", type=Path, help="where the sheets go: OUT_drawn.png, OUT_described.png, OUT_rebuilt.png")
    arguments = parser.parse_args()
    examples: dict[str, list[dict[str, Any]]] = json.loads((arguments.run / "examples.json").read_text())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in examples["drawings"]:
        groups.setdefault((item["split"], item["skill"]), []).append(item)
    drawn = [item for n in range(24) for group in groups.values() for item in group[n:n + 1]][:21]
    described = [item for n in range(8) for split in dict.fromkeys(i["split"] for i in examples["descriptions"])
                 for item in [i for i in examples["descriptions"] if i["split"] == split][n:n + 1]][:9]
    sheets = {
        "drawn": sheet([([i["picture"]], mark(i["right"]) + i["prompt"]) for i in drawn], 7, 4),
        "described": sheet([([i["picture"]], "\n".join([mark(i["right"]) + i["description"], *(
            f"{a['question']} {a['answer'] if i['right'] is not None else a['expected']}" for a in i["answers"][:4])]))
            for i in described], 9, 13),
        "rebuilt": sheet([([i["original"], i["reconstruction"]], "") for i in examples["reconstructions"][:12]], 4, 0)}
    for name, page in sheets.items():
        path = arguments.out.with_name(f"{arguments.out.name}_{name}.png")
        page.quantize(128).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
