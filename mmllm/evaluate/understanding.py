"""Does the model see what is there? Descriptions and answers about pictures of the scene world.

A description is exact when it states every object of the scene and nothing that is not there (`data.scenes.text.caption_exact`);
an answer is right when it is the expected one, letter by letter.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.images import to_tensor
from data.scenes.image import render
from data.scenes.tasks import Question, questions
from data.scenes.text import caption_exact
from data.scenes.world import Scene, World
from mmllm.generate.engine import Engine


@dataclass(frozen=True)
class Seen:
    """A picture [H, W, 3], what the model said of it, and its answers beside the questions."""

    split: str
    picture: NDArray[np.uint8]
    description: str
    right: bool
    answers: tuple[tuple[Question, str], ...]


def understanding(engine: Engine, world: World, splits: Sequence[str], count: int,
                  seed: int) -> tuple[dict[str, dict[str, object]], list[Seen]]:
    """{split: {caption_exact, answers: {kind…, overall}}} over `count` pictures of each split, every question of each."""
    scores: dict[str, dict[str, object]] = {}
    seen: list[Seen] = []
    for split in splits:
        scenes: list[Scene] = [world.scene(seed + 1, index, split) for index in range(count)]
        pictures = np.stack([render(scene) for scene in scenes])
        codes = engine.codes(to_tensor(pictures))
        descriptions = engine.describe(codes)
        exact = [caption_exact(text, scene) for text, scene in zip(descriptions, scenes, strict=True)]
        asked = [questions(scene, random.Random(f"{seed} {split} {n}")) for n, scene in enumerate(scenes)]
        flat = [(number, question) for number, some in enumerate(asked) for question in some]
        said = engine.describe(codes[[number for number, _ in flat]], [question.question for _, question in flat])
        right: dict[str, list[bool]] = defaultdict(list)
        answers: dict[int, list[tuple[Question, str]]] = defaultdict(list)
        for (number, question), answer in zip(flat, said, strict=True):
            right[question.kind].append(answer == question.answer)
            answers[number].append((question, answer))
        by_kind = {kind: float(np.mean(results)) for kind, results in sorted(right.items())}
        by_kind["overall"] = float(np.mean([result for results in right.values() for result in results]))
        scores[split] = {"caption_exact": float(np.mean(exact)), "answers": by_kind}
        seen += [Seen(split, pictures[n], descriptions[n], exact[n], tuple(answers[n])) for n in range(count)]
    return scores, seen
