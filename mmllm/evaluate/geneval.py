"""Pictures for GenEval's prompts, laid out for its scorer, and what the scorer said of them.

    OUT/geneval/00000/metadata.jsonl          line 0 of evaluation_metadata.jsonl
                      samples/0000.png …      `geneval_n` pictures
                00001/…

The layout and the fields of results.jsonl are those of github.com/djghosh13/geneval (README, evaluation/evaluate_images.py). Its detector
(mmdet 2) wants an environment of its own, so scoring is done there:

    python evaluation/evaluate_images.py OUT/geneval --outfile results.jsonl --model-path DETECTOR
    mmllm eval MODEL SHARDS --out OUT --tasks geneval --geneval PROMPTS --geneval-results results.jsonl
"""

import base64
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.images import to_png, to_uint8
from mmllm.evaluate.bootstrap import Measure
from mmllm.evaluate.task import DRAWN_BY, Example, Given, Record, Scores, Task, Unit
from mmllm.generate.sample import Sampling


def units(given: Given) -> list[Unit]:
    path = given.settings.geneval
    if path is None:
        return []
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: give --geneval the evaluation_metadata.jsonl of GenEval")
    out: list[Unit] = []
    for number, line in enumerate(filter(str.strip, path.read_text().splitlines())):
        try:
            made = json.loads(line)
            out.append(Unit(f"{number:05d}", "geneval", (made["tag"], made["prompt"], line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number + 1} is no prompt of GenEval, which has a tag and a prompt ({error!r})") from error
    return out


def run(given: Given, some: list[Unit]) -> list[Record]:
    settings, engine = given.settings, given.engine
    drawn = engine.draw([prompt for _, prompt, _ in (unit.work for unit in some)], n=settings.geneval_n, guidance=settings.guidance,
                        sampling=Sampling(temperature=settings.temperature), seed=settings.seed)  # [p, n, M, h, w]
    records: list[Record] = []
    for unit, codes in zip(some, drawn, strict=True):
        tag, prompt, line = unit.work
        folder = given.out / "geneval" / unit.name
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(line)
        for number, picture in enumerate(to_uint8(engine.pictures(codes))):
            (folder / "samples" / f"{number:04d}.png").write_bytes(to_png(picture))
        records.append({"name": unit.name, "split": unit.split, "skill": tag, "prompt": prompt})
    return records


def score(given: Given, records: list[Record]) -> Scores:
    """Share of pictures that are right by tag, all pictures of a prompt one unit; `overall` is the mean over tags, as GenEval's."""
    path = given.settings.geneval_results
    where = given.out / "geneval"
    if path is None:
        return Scores(missing={"geneval": f"{len(records)} prompts are drawn in {where}: score them with GenEval's evaluate_images.py, "
                                          "then give --geneval-results results.jsonl"})
    found = read_results(path)
    if unknown := sorted(set(found) - {one["name"] for one in records}):
        raise ValueError(f"{path} judges {unknown[0]}, which is no prompt of {where}: give --geneval-results of these pictures")
    notes = [] if len(found) == len(records) else [f"{path.name} judges {len(found)} of {len(records)} prompts."]
    tags = list(dict.fromkeys(tag for tag, _ in found.values()))
    names = tuple(found)
    rows = np.zeros((len(found), 2 * len(tags)))
    for row, (tag, right) in enumerate(found.values()):
        rows[row, 2 * tags.index(tag):2 * tags.index(tag) + 2] = sum(right), len(right)
    measures = {"geneval/overall": Measure(units=names, rows=rows, of="macro")}
    for number, tag in enumerate(tags):
        own = rows[:, 2 * number + 1] > 0
        measures[f"geneval/{tag}"] = Measure(units=tuple(np.array(names)[own].tolist()), rows=rows[own, 2 * number:2 * number + 2])
    return Scores(measures=measures, notes=notes)


def read_results(path: Path) -> dict[str, tuple[str, list[bool]]]:
    """results.jsonl → by prompt its tag and whether each picture is right. Errors: FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: give --geneval-results what GenEval's evaluate_images.py wrote")
    tags: dict[str, str] = {}
    right: dict[str, list[bool]] = defaultdict(list)
    for number, line in enumerate(filter(str.strip, path.read_text().splitlines())):
        try:
            one = json.loads(line)
            name = Path(one["filename"]).parent.parent.name
            tags[name] = one["tag"]
            right[name].append(bool(one["correct"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number + 1} is no result of GenEval, which has filename, tag and correct "
                             f"({error!r})") from error
    return {name: (tags[name], right[name]) for name in sorted(tags)}


def show(given: Given, record: Record) -> Example:
    samples = sorted((given.out / "geneval" / record["name"] / "samples").glob("*.png"))
    return Example([base64.b64encode(path.read_bytes()).decode() for path in samples], [(record["prompt"], None)])


GENEVAL = Task(units=units, run=run, score=score, show=show, decided_by=(*DRAWN_BY, "geneval", "geneval_n"),
               lacking="no prompts given (--geneval evaluation_metadata.jsonl)")
