"""What is asked about scenes: questions with short answers, and prompts whose pictures the detector scores.

A question has one right answer. A prompt has many right pictures, and `score` accepts exactly those: everything that
the prompt states, and no object besides. The six skills are those of GenEval (Ghosh et al. 2023, arXiv:2310.11513).

Neither trains nor tests by accident what is held out: a question names a held-out shape–color pair only when the scene
shows it, never as the wrong choice, or "no" would be learned for it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from data.scenes.detector import Detection
from data.scenes.text import NUMBERS, PLURALS, RELATION_WORDS, Item, Statement, article, holds, place, write
from data.scenes.world import RELATIONS, Kind, Rng, Scene, World, pick

SKILLS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
SKILLS_OF: dict[str, tuple[str, ...]] = {   # by split: the skills whose prompts can name something held out
    "seen": SKILLS,
    "held_out_combinations": ("counting", "position", "color_attribution"),
    "held_out_pairs": ("counting", "colors", "position", "color_attribution"),
}


@dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    level: int
    skill: str
    text: str
    statement: Statement
    """What a picture must show; also what `parse(text)` gives."""


# ---- questions ----------------------------------------------------------------------------------------------------


def questions(scene: Scene, rng: Rng) -> list[Question]:
    """Three to nine: what applies of each kind, kinds in a fixed order. Yes and no have even odds.

    shape       of the only object of its color
    color       of the only object of its shape
    count       of all; and of a shape or a color
    position    of the only object of its shape, color or kind
    exists      a shape, or a shape and color of which one may be wrong
    binding     shape and color are both in the picture; "no" if no object has the two together
    relation    of two objects (level 2 on)
    background"""
    asked: list[Question] = []

    def ask(kind: str, wordings: Sequence[str], answer: str) -> None:
        asked.append(Question(kind, pick(wordings, rng), answer))

    objects = scene.objects
    shapes, colors = Counter(o.shape for o in objects), Counter(o.color for o in objects)
    kinds = Counter(o.kind for o in objects)
    if only := [o for o in objects if colors[o.color] == 1]:
        o = pick(only, rng)
        ask("shape", (f"what shape is the {o.color} object?", f"what is the shape of the {o.color} object?"), o.shape)
    if only := [o for o in objects if shapes[o.shape] == 1]:
        o = pick(only, rng)
        ask("color", (f"what color is the {o.shape}?", f"what is the color of the {o.shape}?"), o.color)
    o = pick(objects, rng)
    ask("count", ("how many objects are there?", "how many objects do you see?"), NUMBERS[len(objects)])
    if rng.random() < 0.5:
        ask("count", (f"how many {PLURALS[o.shape]} are there?",), NUMBERS[shapes[o.shape]])
    else:
        ask("count", (f"how many {o.color} objects are there?",), NUMBERS[colors[o.color]])
    names = [(o, name) for o in objects for name, count in (
        (o.shape, shapes[o.shape]), (f"{o.color} object", colors[o.color]), (f"{o.color} {o.shape}", kinds[o.kind]))
        if count == 1]
    if names:
        o, name = pick(names, rng)
        ask("position", (f"where is the {name}?",), place(scene, o))
    thing, there = _one_that_exists_or_not(scene, rng)
    ask("exists", _is_there(thing), there)
    if bound := _bound_or_not(scene, rng):
        ask("binding", _is_there(bound[0]), bound[1])
    if scene.world.relation_questions and (related := _related_or_not(scene, rng)):
        asked.append(related)
    ask("background", ("what color is the background?", "what is the color of the background?"), scene.background)
    return asked


def _is_there(thing: str) -> tuple[str, ...]:
    return f"is there {article(thing)}?", f"do you see {article(thing)}?", f"is {article(thing)} in the picture?"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _one_that_exists_or_not(scene: Scene, rng: Rng) -> tuple[str, str]:
    """A shape, or a kind that differs from one that is there in its shape or its color."""
    world, o, truth = scene.world, pick(scene.objects, rng), rng.random() < 0.5
    if rng.random() < 0.5:
        absent = [shape for shape in world.shapes if shape not in {p.shape for p in scene.objects}]
        return (o.shape if truth else pick(absent, rng)), _yes(truth)
    there = {p.kind for p in scene.objects}
    absent = [(shape, color) for shape, color in world.trained_kinds
              if (shape, color) not in there and (shape == o.shape) != (color == o.color)]
    shape, color = o.kind if truth else pick(absent, rng)
    return f"{color} {shape}", _yes(truth)


def _bound_or_not(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    there = {o.kind: None for o in scene.objects}                       # in order, unlike a set
    crossed = [(shape, color) for shape, _ in there for _, color in there
               if (shape, color) not in there and (shape, color) not in scene.world.held_out_pairs]
    if not crossed:
        return None
    truth = rng.random() < 0.5
    shape, color = pick(list(there) if truth else crossed, rng)
    return f"{color} {shape}", _yes(truth)


def _related_or_not(scene: Scene, rng: Rng) -> Question | None:
    kinds = Counter(o.kind for o in scene.objects)
    unique = [o for o in scene.objects if kinds[o.kind] == 1]
    if len(unique) < 2:
        return None
    a = pick(unique, rng)
    b = pick([o for o in unique if o is not a], rng)
    truth, true = rng.random() < 0.5, scene.world.relations(a, b)
    relation = pick([relation for relation in RELATIONS if (relation in true) == truth], rng)
    words = pick(RELATION_WORDS[relation], rng)
    return Question("relation", f"is the {a.color} {a.shape} {words} the {b.color} {b.shape}?", _yes(truth))


# ---- prompts --------------------------------------------------------------------------------------------------------


def prompts(world: World, skill: str, split: str, n: int, seed: int) -> list[Prompt]:
    """`n` prompts of a skill, worded as captions are; texts repeat only where the world has no more.

    single_object      "a circle"
    two_objects        "a circle and a star"
    counting           "two stars", "three red circles", "two red circles and a blue star"
    colors             "a red circle"
    position           "a red circle above a blue star"
    color_attribution  "a red circle and a blue star": both their shapes and their colors differ

    Of seen, nothing named is held out. Of held_out_combinations, what is named includes a held-out couple, with colors;
    cells are not named, so held-out triples show in describing only. Of held_out_pairs, a kind named is held out."""
    if skill not in SKILLS_OF.get(split, ()):
        raise ValueError(f"no prompts of skill {skill!r} in split {split!r}: "
                         + "; ".join(f"{name} has {', '.join(skills)}" for name, skills in SKILLS_OF.items()))
    rng = Random(f"{seed}/{skill}/{split}/{world.level}")
    told: list[Prompt] = []
    texts: set[str] = set()
    for _ in range(n):
        drawn = (Prompt(world.level, skill, write(statement, rng), statement)
                 for statement in (_statement(world, skill, split, rng) for _ in range(20)))
        prompt = next(drawn)
        while prompt.text in texts and (another := next(drawn, None)):
            prompt = another
        texts.add(prompt.text)
        told.append(prompt)
    return told


def _statement(world: World, skill: str, split: str, rng: Rng) -> Statement:
    relation = pick(RELATIONS, rng) if skill == "position" else None
    background = pick(world.backgrounds, rng) if rng.random() < 0.25 else None
    pattern: tuple[int, ...] = (1,) if skill in ("single_object", "colors") else (1, 1)
    if skill == "counting":
        pattern = pick([p for p in world.patterns if len(p) <= 2 and max(p) > 1], rng)
    kinds = _kinds(world, split, pattern, apart=skill in ("two_objects", "color_attribution"), rng=rng)
    open_color = skill in ("single_object", "two_objects") or (
        skill == "counting" and split == "seen" and len(pattern) == 1 and rng.random() < 0.5)
    items = (Item(count, shape, None if open_color else color)
             for count, (shape, color) in zip(pattern, kinds, strict=True))
    return Statement(tuple(items), relation, background)


def _kinds(world: World, split: str, pattern: tuple[int, ...], apart: bool, rng: Rng) -> list[Kind]:
    """Different kinds, with `apart` also in both shape and color, that together hold out what the split says."""
    while True:
        kinds = [pick(world.kinds, rng) for _ in pattern]
        held_out = world.held_out_in([kind for kind, count in zip(kinds, pattern, strict=True) for _ in range(count)])
        differ = [len(set(values)) == len(kinds) for values in zip(*kinds, strict=True)]
        if (all(differ) if apart else len(set(kinds)) == len(kinds)) and (held_out or "seen") == split:
            return kinds


def score(prompt: Prompt, detection: Detection) -> bool:
    """Whether the picture shows exactly what the prompt says: all of it, no other object, the background if named."""
    return holds(prompt.statement, detection.objects, detection.background, World.at_level(prompt.level))
