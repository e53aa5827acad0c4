"""Does the model draw what it is told? Pictures of the scene world, read back by the detector, scored per skill.

Skills and strictness are GenEval's (Ghosh et al. 2023, arXiv:2310.11513, table 1), except that the whole picture counts: nothing
missing, nothing besides.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.images import fit, to_array, to_png, to_uint8
from data.scenes.detector import detect
from data.scenes.tasks import SKILLS_OF, Prompt, prompts, score
from data.scenes.world import World
from mmllm.evaluate.bootstrap import Measure, mean
from mmllm.evaluate.task import DRAWN_BY, Example, Given, Record, Scores, Task, Unit, by_split
from mmllm.generate.engine import Engine
from mmllm.generate.sample import Sampling


@dataclass(frozen=True)
class Drawn:
    """A prompt, its picture [H, W, 3] and whether the picture is right."""

    split: str
    skill: str
    prompt: str
    picture: NDArray[np.uint8]
    right: bool


def generation(engine: Engine, world: World, splits: Sequence[str], count: int, seed: int,
               sampling: Sampling) -> tuple[dict[str, dict[str, float]], list[Drawn]]:
    """Scores by split and skill, `overall` their mean, and every picture. `count`: prompts a skill and split."""
    scores: dict[str, dict[str, float]] = {}
    drawn: list[Drawn] = []
    for split in splits:
        scores[split] = {}
        for skill in SKILLS_OF[split]:
            asked = [(split, prompt) for prompt in prompts(world, skill, split, count, seed)]
            some = draw(engine, world, asked, seed, sampling)
            scores[split][skill] = float(np.mean([one.right for one in some]))
            drawn += some
        scores[split]["overall"] = float(np.mean(list(scores[split].values())))
    return scores, drawn


def draw(engine: Engine, world: World, asked: Sequence[tuple[str, Prompt]], seed: int, sampling: Sampling,
         guidance: float = 1.0) -> list[Drawn]:
    """One picture for each prompt of a split, judged; one of another size than the world's is fitted to it first."""
    codes = engine.draw([prompt.text for _, prompt in asked], guidance=guidance, sampling=sampling, seed=seed)[:, 0]
    pictures = to_uint8(engine.pictures(codes))
    side = world.image_size
    fitting = [picture if picture.shape[:2] == (side, side) else to_array(fit(Image.fromarray(picture), side)) for picture in pictures]
    return [Drawn(split, prompt.skill, prompt.text, picture, score(prompt, detect(picture, world)))
            for (split, prompt), picture in zip(asked, fitting, strict=True)]


# A task of `mmllm eval` -------------------------------------------------------------------------------------------

def world_of(given: Given) -> World | None:
    """The world whose scenes the shards hold."""
    scene = next((item.document.meta["scene"] for item in given.items if "scene" in item.document.meta), None)
    return World.at_level(scene["level"]) if isinstance(scene, dict) else None


def units(given: Given) -> list[Unit]:
    """The first prompts of each skill, for each split that is there; the same ones for every model."""
    world, there = world_of(given), {item.split for item in given.items}
    return [] if world is None else [
        Unit(f"{split}/{skill}/{number}", split, prompt) for split, skills in SKILLS_OF.items() if split in there for skill in skills
        for number, prompt in enumerate(prompts(world, skill, split, given.settings.prompts, given.settings.seed))]


def run(given: Given, some: list[Unit]) -> list[Record]:
    world, settings = world_of(given), given.settings
    assert world is not None, "units without a world"
    drawn = draw(given.engine, world, [(unit.split, unit.work) for unit in some], settings.seed,
                 Sampling(temperature=settings.temperature), settings.guidance)
    return [{"name": unit.name, "split": unit.split, "skill": one.skill, "prompt": one.prompt, "right": bool(one.right),
             "picture": base64.b64encode(to_png(one.picture)).decode()} for unit, one in zip(some, drawn, strict=True)]


def by_skill(records: Sequence[Record]) -> dict[str, Measure]:
    """Share of right pictures by split and skill; `overall` is the mean over skills."""
    measures: dict[str, Measure] = {}
    for split, some in by_split(list(records)).items():
        skills = list(dict.fromkeys(one["skill"] for one in some))
        rows = np.zeros((len(some), 2 * len(skills)))
        for row, one in enumerate(some):
            column = 2 * skills.index(one["skill"])
            rows[row, column:column + 2] = one["right"], 1
        measures[f"{split}/overall"] = Measure(units=tuple(one["name"] for one in some), rows=rows, of="macro")
        for skill in skills:
            own = [one for one in some if one["skill"] == skill]
            measures[f"{split}/{skill}"] = mean([one["name"] for one in own], [one["right"] for one in own])
    return measures


def show(_: Given, record: Record) -> Example:
    return Example([record["picture"]], [(record["prompt"], record["right"])])


SCENES = Task(units=units, run=run, score=lambda _, records: Scores(measures=by_skill(records)), show=show, decided_by=DRAWN_BY,
              lacking="the shards hold no scenes, whose ground truth the detector reads back (`mmllm data scenes`)")
