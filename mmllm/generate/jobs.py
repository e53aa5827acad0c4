"""Many pictures or descriptions from a file, in pieces that are kept: a job that was stopped goes on where it was.

    OUT/pictures.jsonl   {"id", "how", "files", "scores"?}, a line a prompt
        ID-0.png …       its pictures
    OUT.jsonl            {"id", "picture", "question"?, "text" or "error"}, a line a picture

A line counts once it is whole, and is written behind its pictures; what a crash cut is done again. What a line says depends on its own
words and options alone, so a stopped job and one that ran through give the same.
"""

import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.files import written
from data.images import Refused, fitted, to_array, to_tensor, to_uint8
from data.tokens import sizes_of
from mmllm.generate.best import agreement
from mmllm.generate.engine import Engine
from mmllm.generate.plan import Plan
from mmllm.generate.sample import Sampling
from mmllm.generate.speculate import Speculation

CHUNK = 64
"""Lines done together; what a stop costs at most."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
Tell = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the pictures of a prompt are drawn; a line of the file may say otherwise, by these names."""

    n: int = 1
    """Pictures of the prompt."""
    guidance: float = 1.0
    """As `Plan` has it."""
    temperature: float = 0.3
    """Of image codes, as `Sampling` has it; so are the next two."""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    """Same seed, same pictures."""
    negative: str = ""
    """What guidance leads away from."""
    grid: tuple[int, int] | None = None
    """(h, w) of codes."""
    best_of: int = 0
    """Draw so many and keep the n that the model judges best (mmllm/generate/best.py); 0 draws n."""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 10_000 or (self.best_of and self.best_of < self.n):
            raise ValueError(f"n {self.n} must be from 1 to 10,000, and best_of {self.best_of} at least n, or 0")

    @property
    def plan(self) -> Plan:
        image = Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        return Plan(image=image, guidance=self.guidance, negative=self.negative, only_picture=True)

    def changed(self, line: Mapping[str, Any]) -> "Drawing":
        """With what a line says."""
        kinds = {name: type(value) for name, value in asdict(Drawing()).items()} | {"grid": list}
        said = {name: value for name, value in line.items() if name in kinds}
        for name, value in said.items():
            if isinstance(value, bool) or not isinstance(value, (int, float) if kinds[name] is float else kinds[name]):
                raise ValueError(f"{name} is {value!r}, which should be {kinds[name].__name__}")
        if "grid" in said:
            if len(said["grid"]) != 2 or not all(type(side) is int for side in said["grid"]):
                raise ValueError(f"grid is {said['grid']!r}, which should be [h, w]")
            said["grid"] = (said["grid"][0], said["grid"][1])
        return Drawing(**{**asdict(self), **said})


def draw(engine: Engine, prompts: Sequence[str], hows: Sequence[Drawing],
         ahead: Speculation | None = None) -> list[tuple[list[NDArray[np.int32]], list[float]]]:
    """Pictures of any sizes and ways, together. → codes [M, h, w] of each picture of each prompt, and their scores where chosen among."""
    requests = [engine.draw_requests(words, how.best_of or how.n, how.plan, how.seed, how.grid)
                for words, how in zip(prompts, hows, strict=True)]
    flat = [request for some in requests for request in some]
    drawn = iter([engine.picture_of(request, ids) for request, ids in zip(flat, engine.decode(flat, ahead), strict=True)])
    out: list[tuple[list[NDArray[np.int32]], list[float]]] = []
    for words, how, some in zip(prompts, hows, requests, strict=True):
        codes, scores = [next(drawn) for _ in some], list[float]()
        if how.best_of:
            found = agreement(engine, [words], np.stack(codes)[None])[0]
            order = np.argsort(-found, kind="stable")[:how.n]
            codes, scores = [codes[i] for i in order], found[order].tolist()
        out.append((codes, scores))
    return out


def generate(engine: Engine, source: Path, out: Path, how: Drawing, scale: int = 1, ahead: Speculation | None = None,
             tell: Tell = lambda done, whole: None) -> int:
    """Pictures for the prompts of a jsonl file ({"prompt", "id"?, and any of `Drawing`}). → prompts done now. Errors: ValueError."""
    lines = list(_prompts(source, how))
    for _, _, its in lines:
        if its.grid is not None:
            engine.folder.vocab.grid(*its.grid)  # refused before anything is drawn
    out.mkdir(parents=True, exist_ok=True)
    with _log(out / "pictures.jsonl") as (done, file):
        left = [line for line in lines if line[0] not in done]
        for name, words, its in lines:
            if name in done and done[name].get("how") != (now := {"prompt": words, **json.loads(json.dumps(asdict(its)))}):
                raise ValueError(f"{out}/pictures.jsonl has {name!r} as {done[name].get('how')}, now it is {now}: give another --out")
        for first in range(0, len(left), CHUNK):
            part = left[first:first + CHUNK]
            tell(len(lines) - len(left) + first, len(lines))
            drawn = draw(engine, [words for _, words, _ in part], [its for _, _, its in part], ahead)
            for (name, words, its), (codes, scores) in zip(part, drawn, strict=True):
                files = [f"{name}-{number}.png" for number in range(len(codes))]
                for path, one in zip(files, codes, strict=True):
                    save(engine, one, out / path, scale)
                _say(file, {"id": name, "how": {"prompt": words, **asdict(its)}, "files": files, **({"scores": scores} if scores else {})})
        tell(len(lines), len(lines))
    return len(left)


def describe(engine: Engine, source: Path, out: Path, question: str | None = None, tell: Tell = lambda done, whole: None) -> int:
    """Descriptions or answers for the pictures of a folder, or of a jsonl file ({"picture", "question"?, "id"?}); `out` is a jsonl file.
    A picture that is refused gets an "error". → pictures done now."""
    lines = list(_pictures(source, question))
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = sizes_of(engine.visual)
    with _log(out) as (done, file):
        left = [line for line in lines if line[0] not in done]
        for name, _, asked in lines:
            if name in done and done[name].get("question") != asked:
                raise ValueError(f"{out} has {name!r} with the question {done[name].get('question')!r}, now it is {asked!r}: "
                                 "give another --out")
        for first in range(0, len(left), CHUNK):
            tell(len(lines) - len(left) + first, len(lines))
            said: dict[str, dict[str, Any]] = {}
            seen: list[tuple[str, str | None, NDArray[np.int32]]] = []
            for name, path, asked in left[first:first + CHUNK]:
                said[name] = {"id": name, "picture": str(path), **({"question": asked} if asked else {})}
                try:
                    picture = to_tensor(to_array(fitted(path, sizes))[None])
                except (Refused, FileNotFoundError) as error:
                    said[name]["error"] = str(error)
                else:
                    seen.append((name, asked, engine.codes(picture)[0]))
            for plain in (True, False):
                some = [one for one in seen if (one[1] is None) == plain]
                texts = engine.describe([codes for _, _, codes in some], None if plain else [asked or "" for _, asked, _ in some])
                for (name, _, _), text in zip(some, texts, strict=True):
                    said[name]["text"] = text
            for line in said.values():
                _say(file, line)
        tell(len(lines), len(lines))
    return len(left)


def save(engine: Engine, codes: NDArray[np.int32], path: Path, scale: int = 1) -> None:
    """A picture as a file that is whole or not there. codes [M, h, w]; scale: screen pixels for a pixel."""
    picture = to_uint8(engine.pictures(codes[None]))[0]
    height, width = picture.shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with written(path) as beside:
        Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST).save(beside, kind)


# Files ------------------------------------------------------------------------------------------------------------

def _prompts(source: Path, how: Drawing) -> Iterator[tuple[str, str, Drawing]]:
    """(id, prompt, how) of each line."""
    seen = set[str]()
    for number, line in _lines(source):
        try:
            words, name = line["prompt"], str(line.get("id", f"{number:06d}"))
            if not isinstance(words, str) or not words.strip():
                raise ValueError("the prompt is no text")
            if name in seen or not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"the id {name!r} came before, or is no file name")
            its = how.changed(line)
        except KeyError:
            raise ValueError(f"{source}:{number}: a line needs a \"prompt\"") from None
        except ValueError as error:
            raise ValueError(f"{source}:{number}: {error}") from error
        seen.add(name)
        yield name, words, its


def _pictures(source: Path, question: str | None) -> Iterator[tuple[str, Path, str | None]]:
    """(id, file, question) of each picture."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES):
            yield str(path.relative_to(source)), path, question
        return
    for number, line in _lines(source):
        if not isinstance(line.get("picture"), str):
            raise ValueError(f"{source}:{number}: a line needs a \"picture\", the path of a file")
        yield str(line.get("id", f"{number:06d}")), source.parent / line["picture"], line.get("question", question)


def _lines(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not empty."""
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    for number, text in enumerate(source.read_text().splitlines(), 1):
        if text.strip():
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}:{number} is no JSON: {error}") from error
            if not isinstance(line, dict):
                raise ValueError(f"{source}:{number} is no JSON object")
            yield number, line


@contextmanager
def _log(path: Path) -> Generator[tuple[dict[str, dict[str, Any]], TextIO]]:
    """Lines that are there, by id, and the file to add to; a line that a crash cut is dropped."""
    text = path.read_text() if path.is_file() else ""
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    with path.open("a") as file:
        yield {line["id"]: line for line in map(json.loads, whole.splitlines())}, file


def _say(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())
