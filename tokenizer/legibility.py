"""Does text survive the tokenizer? Words are drawn at several heights, coded and decoded, and read back by a program.

Text is the first detail that a small code loses and no pixel average notices. As in TokBench (Wu et al. 2025, arXiv:2505.18142) an OCR
program is the judge; here the words are made, not found, so every height, plain and photographic grounds, and the truth are known,
and what the program reads of the *original* is the ceiling that the reconstruction is held against.

    word → picture ─ encode, decode → picture ─ cut the line out, 32 px high → read → characters right

A reader is a function from lines to words: `tesseract` makes one. Letters: H W pixels.
"""

import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

Picture = NDArray[np.uint8]
"""[H, W, 3]"""
Reader = Callable[[Sequence[Picture]], list[str]]
"""Lines of text, each a picture of its own → what they say."""
Ground = Literal["plain", "photograph"]

CONSONANTS, VOWELS, DIGITS = "bdfghkmnprstvz", "aeou", "0123456789"
"""No i, j, l: at 8 px they are the same stroke."""
LONGEST, WIDEST = 6, "mem"
"""Characters of a word, which is cut to what fits; the widest of the shortest words."""
PLACES = 8
LINE = 32
"""px: height of the text in a line that is handed to the reader; of 32, 40 and 64 tesseract reads originals best at 32."""


@dataclass(frozen=True, kw_only=True)
class Legibility:
    """Which words are drawn, how large, and how many."""

    heights: tuple[int, ...] = (7, 9, 12, 16, 24, 32)
    """Heights of a digit in px; one at which three characters do not fit is left out."""
    words: int = 16
    """Words for each height and ground; half of them digits, half syllables."""
    font: Path | None = None
    """A TrueType font; None is the one inside PIL."""
    seed: int = 0
    """Of words, places and colours."""

    def __post_init__(self) -> None:
        if self.font is not None and not self.font.is_file():
            raise FileNotFoundError(f"there is no font {self.font}: give --font a TrueType file, or none for PIL's own")


class Case(NamedTuple):
    word: str
    height: int
    """px of a digit"""
    ground: Ground
    box: tuple[int, int, int, int]
    """left, top, right, bottom of the word in px"""
    picture: Picture


class Read(NamedTuple):
    """A case and what became of it."""

    case: Case
    original: Picture
    """the line, cut out of the original"""
    rebuilt: Picture
    """and of the reconstruction"""
    said: tuple[str, str]
    """what the reader says of the two"""


def cases(settings: Legibility, side: int, photographs: Sequence[Picture]) -> Iterator[Case]:
    """Words on square pictures of `side` px, on plain grounds and, where there are any, on photographs [side, side, 3]. A pure function
    of its arguments: white text where it is dark below, black where it is light."""
    grounds: list[Ground] = ["plain", "photograph"] if photographs else ["plain"]
    fonts = {height: _font(settings.font, height) for height in settings.heights}
    for ground in grounds:
        for height, font in fonts.items():
            if max(_size(font, WIDEST)) > side:
                continue
            for number in range(settings.words):
                rng = random.Random(f"{settings.seed} {height} {ground} {number}")
                word = _word(rng, number % 2 == 0)
                while _size(font, word)[0] > side:
                    word = word[:-1]
                base = (np.full((side, side, 3), [rng.randrange(256) for _ in range(3)], np.uint8) if ground == "plain"
                        else photographs[number % len(photographs)])
                yield _drawn(word, height, ground, base, font, rng)


def _word(rng: random.Random, digits: bool) -> str:
    if digits:
        return "".join(rng.choice(DIGITS) for _ in range(LONGEST))
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(LONGEST // 2))


def _font(path: Path | None, height: int) -> "FreeTypeFont | ImageFont":
    """The smallest size at which a digit is `height` px high."""
    from PIL import ImageFont

    size = height
    while True:
        font = ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)
        _, top, _, bottom = font.getbbox("0")
        if bottom - top >= height or size > 8 * height:
            return font
        size += 1


def _size(font: Any, word: str) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(word)
    return int(right - left), int(bottom - top)


def _drawn(word: str, height: int, ground: Ground, base: Picture, font: Any, rng: random.Random) -> Case:
    """The word on a ground, at the evenest of a few places: on leaves nobody can read."""
    from PIL import Image, ImageDraw

    (width, high), side = _size(font, word), len(base)
    luma = base @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    places = [(rng.randint(0, side - width), rng.randint(0, side - high)) for _ in range(PLACES)]
    below = [luma[top:top + high, left:left + width] for left, top in places]
    (left, top), under = min(zip(places, below, strict=True), key=lambda place: float(place[1].std()))
    image = Image.fromarray(base)
    x, y, _, _ = font.getbbox(word)
    ImageDraw.Draw(image).text((left - x, top - y), word, "black" if under.mean() > 127 else "white", font)
    return Case(word, height, ground, (left, top, left + width, top + high), np.asarray(image))


def line(picture: Picture, case: Case) -> Picture:
    """The word's box with half its text's height around it, the border repeated where the picture ends; scaled (bicubic) so that the
    text is 32 px high."""
    from PIL import Image

    margin, (left, top, right, bottom) = (case.height + 1) // 2, case.box
    wide = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    cut = wide[top:bottom + 2 * margin, left:right + 2 * margin]
    scale = LINE / case.height
    return np.asarray(Image.fromarray(cut).resize((round(cut.shape[1] * scale), round(cut.shape[0] * scale)), Image.Resampling.BICUBIC))


def legibility(settings: Legibility, side: int, photographs: Sequence[Picture], rebuild: Callable[[Picture], Picture], read: Reader,
               batch: int = 64) -> tuple[list[dict[str, Any]], list[Read]]:
    """`rebuild`: uint8 [b, H, W, 3] encoded and decoded. → a row for each ground and height, and every case.

    `characters`: mean over words of 1 − edit distance / length of the longer of truth and answer. `words`: share read without an error.
    Answers are lower-cased and stripped of blanks. `original` beside it is the same of the picture before it was coded."""
    asked = list(cases(settings, side, photographs))
    if not asked:
        raise ValueError(f"no word of {len(WIDEST)} characters at heights {settings.heights} fits {side} px: give smaller heights")
    back = [picture for first in range(0, len(asked), batch)
            for picture in rebuild(np.stack([case.picture for case in asked[first:first + batch]]))]
    lines = [(line(case.picture, case), line(picture, case)) for case, picture in zip(asked, back, strict=True)]
    said = [answer.lower().replace(" ", "") for answer in read([cut for pair in lines for cut in pair])]
    reads = [Read(case, *pair, (a, b)) for case, pair, a, b in zip(asked, lines, said[::2], said[1::2], strict=True)]
    rows: list[dict[str, Any]] = []
    for ground, height in dict.fromkeys((one.case.ground, one.case.height) for one in reads):
        some = [one for one in reads if (one.case.ground, one.case.height) == (ground, height)]
        row: dict[str, Any] = {"ground": ground, "height": height, "count": len(some)}
        for at, which in enumerate(("original", "rebuilt")):
            row[which] = {"characters": float(np.mean([characters(one.said[at], one.case.word) for one in some])),
                          "words": float(np.mean([one.said[at] == one.case.word for one in some]))}
        rows.append(row)
    return rows, reads


def characters(answer: str, truth: str) -> float:
    """1 − Levenshtein distance / length of the longer, in [0, 1]."""
    row = list(range(len(truth) + 1))
    for i, a in enumerate(answer, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(truth, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return 1 - row[-1] / max(len(answer), len(truth), 1)


@contextmanager
def _one_thread() -> Generator[None]:
    """Programs started here use one OpenMP thread: with two on two busy cores tesseract takes twenty times as long."""
    name, before = "OMP_THREAD_LIMIT", os.environ.get("OMP_THREAD_LIMIT")
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def tesseract() -> Reader | None:
    """Reader by the tesseract program, through pytesseract; None where either is missing. One process reads all lines (--psm 7: a
    picture is one line), letters and digits alone, with its English model."""
    try:
        import pytesseract

        pytesseract.get_tesseract_version()
    except (ImportError, OSError):  # TesseractNotFoundError is an OSError
        return None

    def read(lines: Sequence[Picture]) -> list[str]:
        from PIL import Image

        with TemporaryDirectory(prefix="mmllm-lines-") as name:
            folder = Path(name)
            paths = [folder / f"{number:06d}.png" for number in range(len(lines))]
            for path, picture in zip(paths, lines, strict=True):
                Image.fromarray(picture).save(path, compress_level=1)
            (folder / "lines.list").write_text("".join(f"{path}\n" for path in paths))
            with _one_thread():
                text = pytesseract.image_to_string(str(folder / "lines.list"), lang="eng",
                                                   config=f"--psm 7 -c tessedit_char_whitelist={DIGITS}{ascii_lowercase}")
        pages = str(text).split("\f")
        if len(pages) < len(lines):
            raise ValueError(f"tesseract read {len(pages)} of {len(lines)} lines; is its English model there (tesseract-ocr-eng)?")
        return [page.strip() for page in pages[:len(lines)]]

    return read
