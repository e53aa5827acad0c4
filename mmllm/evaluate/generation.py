"""Does the model draw what it is told? Pictures of the scene world, read back by the detector, scored per skill.

Skills and strictness are GenEval's (Ghosh et al. 2023, arXiv:2310.11513, table 1), except that the whole picture counts: nothing
missing, nothing besides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.detector import detect
from data.images import to_uint8
from data.scene_tasks import SKILLS_OF, prompts, score
from data.scenes import World
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
            asked = prompts(world, skill, split, count, seed)
            codes = engine.draw([prompt.text for prompt in asked], sampling=sampling, seed=seed)[:, 0]
            pictures = to_uint8(engine.pictures(codes))
            results = [score(prompt, detect(picture, world)) for prompt, picture in zip(asked, pictures, strict=True)]
            scores[split][skill] = float(np.mean(results))
            drawn += [Drawn(split, skill, prompt.text, picture, right)
                      for prompt, picture, right in zip(asked, pictures, results, strict=True)]
        scores[split]["overall"] = float(np.mean(list(scores[split].values())))
    return scores, drawn
