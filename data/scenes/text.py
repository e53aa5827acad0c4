"""What can be said of a scene in words, and back from words to what they say.

A *statement* is the meaning: so many objects of these shapes, perhaps their colors, places, one relation, the
background. `write` puts a statement into words, in one canonical form or with a choice of wordings; `parse` inverts
every wording of `write` and gives None for anything else; `holds` compares a statement with what is in a picture, the
scene itself or what the detector found. Captions, prompts and the score of a description all rest on these three."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from data.scenes.world import BACKGROUNDS, COLORS, SHAPES, Kind, Placed, Rng, Scene, World, pick

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
PLACES: dict[int, tuple[str, ...]] = {     # by cells a side, in reading order
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"),
}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    **{corner: (f"in the {corner}", f"in the {corner} corner", f"at the {corner}") for corner in PLACES[2]},
    "top": ("at the top",), "bottom": ("at the bottom",), "left": ("on the left",), "right": ("on the right",),
    "center": ("in the center", "in the middle"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "above": ("above", "on top of", "over"), "below": ("below", "under", "beneath"),
    "left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
NEAR = 2          # pixels by which an object may miss its place or its relation: nobody sees that


@dataclass(frozen=True)
class Item:
    count: int
    shape: str
    color: str | None = None
    place: str | None = None
    """Of a single object only."""


@dataclass(frozen=True)
class Statement:
    """The picture holds these objects and no others."""

    items: tuple[Item, ...]
    relation: str | None = None
    """Of the first item to the second, which are then the only ones and single."""
    background: str | None = None


# ---- into words -------------------------------------------------------------------------------------------------


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _item_words(item: Item, rng: Rng | None) -> str:
    noun = item.shape if item.count == 1 else PLURALS[item.shape]
    words = f"{item.color} {noun}" if item.color else noun
    words = article(words) if item.count == 1 else f"{NUMBERS[item.count]} {words}"
    return f"{words} {_one_of(PLACE_WORDS[item.place], rng)}" if item.place else words


def _one_of(wordings: Sequence[str], rng: Rng | None) -> str:
    return wordings[0] if rng is None else pick(wordings, rng)


def write(statement: Statement, rng: Rng | None = None) -> str:
    """In the canonical wording, or with `rng` in any of ours."""
    items = [_item_words(item, rng) for item in statement.items]
    if statement.relation:
        words = f"{items[0]} {_one_of(RELATION_WORDS[statement.relation], rng)} {items[1]}"
    else:
        words = ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]
    lead = "" if rng is None else pick(("", "", "", "a picture of ", "there is " if statement.items[0].count == 1 else
                                        "there are "), rng)
    if statement.background is None:
        return lead + words
    background = article(statement.background) + " background"
    if rng is not None and not lead and rng.random() < 0.25:
        return f"{background} with {words}"
    return f"{lead}{words} {_one_of(('on', 'against'), rng)} {background}"


# ---- and back -----------------------------------------------------------------------------------------------------


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_PLACES = {words: place for place, wordings in PLACE_WORDS.items() for words in wordings}
_RELATIONS = {words: relation for relation, wordings in RELATION_WORDS.items() for words in wordings}
_COUNTS = {**{words: count for count, words in NUMBERS.items() if count > 1}, "a": 1, "an": 1}
_NOUNS = {**{shape: (shape, False) for shape in SHAPES}, **{PLURALS[shape]: (shape, True) for shape in SHAPES}}
_ITEM = re.compile(rf"({_any(list(_COUNTS))}) (?:({_any(list(COLORS))}) )?({_any(list(_NOUNS))})"
                   rf"(?: ({_any(list(_PLACES))}))?")
_LEAD = re.compile(r"(?:a picture of |there is |there are )?")
_BACKGROUND = rf"an? ({_any(list(BACKGROUNDS))}) background"
_WITH = re.compile(rf"{_BACKGROUND} with (.*)")
_ON = re.compile(rf"(.*) (?:on|against) {_BACKGROUND}")
_RELATED = re.compile(rf"(.*?) ({_any(list(_RELATIONS))}) (.*)")


def _parse_item(words: str) -> Item | None:
    match = _ITEM.fullmatch(words)
    if match is None:
        return None
    shape, plural = _NOUNS[match[3]]
    count = _COUNTS[match[1]]
    item = Item(count, shape, match[2], _PLACES[match[4]] if match[4] else None)
    agrees = plural == (count > 1) and not (item.place and plural)
    return item if agrees and (plural or words.startswith(article(match[2] or shape))) else None


def parse(text: str) -> Statement | None:
    """What the text states, or None if it is not one of our sentences; case, outer spaces and a full stop are free."""
    words, background = text.strip().lower().removesuffix("."), None
    if match := _WITH.fullmatch(words):
        background, words = match[1], match[2]
    else:
        words = words[_LEAD.match(words).end():]        # pyright: ignore[reportOptionalMemberAccess]  it matches ""
        if match := _ON.fullmatch(words):
            words, background = match[1], match[2]
    relation = None
    if match := _RELATED.fullmatch(words):
        relation, parts = _RELATIONS[match[2]], [match[1], match[3]]
    else:
        parts = re.split(r", | and ", words)
    items = [item for item in map(_parse_item, parts) if item]
    if len(items) < len(parts) or (relation and any(item.count > 1 for item in items)):
        return None
    return Statement(tuple(items), relation, background)


# ---- truth ----------------------------------------------------------------------------------------------------------


def _at_place(world: World, thing: Placed, place: str) -> bool:
    row, column = divmod(PLACES[world.cells].index(place), world.cells)
    side = world.image_size / world.cells
    return all(i * side - NEAR <= v <= (i + 1) * side + NEAR for i, v in ((column, thing.x), (row, thing.y)))


def holds(statement: Statement, things: Sequence[Placed], background: str | None, world: World) -> bool:
    """Whether the things are exactly those stated, no more and no fewer, and all else that is stated is true."""
    wanted = [item for item in statement.items for _ in range(item.count)]
    if len(wanted) != len(things) or (statement.background and statement.background != background):
        return False
    if any(item.place and item.place not in PLACES[world.cells] for item in wanted):
        return False

    def fits(item: Item, thing: Placed) -> bool:
        return (thing.shape == item.shape and thing.color is not None and item.color in (None, thing.color)
                and (item.place is None or _at_place(world, thing, item.place)))

    def related(a: Placed, b: Placed) -> bool:
        return statement.relation is None or statement.relation in world.relations(a, b, world.relation_margin - NEAR)

    return any(all(map(fits, wanted, order)) and (len(order) < 2 or related(order[0], order[1]))
               for order in permutations(things))


def caption_exact(text: str, scene: Scene) -> bool:
    """Whether a description gives every object with shape and color and none besides, and says nothing false."""
    statement = parse(text)
    return (statement is not None and all(item.color for item in statement.items)
            and holds(statement, scene.objects, scene.background, scene.world))


# ---- captions ---------------------------------------------------------------------------------------------------


def groups(scene: Scene) -> list[tuple[Kind, int]]:
    """The kinds with their counts, the most numerous first, else in reading order."""
    return Counter(o.kind for o in scene.objects).most_common()


def place(scene: Scene, thing: Placed) -> str:
    return PLACES[scene.world.cells][scene.world.cell(thing.x, thing.y)]


def full(scene: Scene) -> Statement:
    """All objects, the place of one, the relation of two, the background: what the canonical description says."""
    items = tuple(Item(count, *kind) for kind, count in groups(scene))
    relation = None
    if len(scene.objects) == 1:
        items = (Item(1, *scene.objects[0].kind, place(scene, scene.objects[0])),)
    elif len(items) == len(scene.objects) == 2:
        relation = scene.world.relations(scene.objects[0], scene.objects[1])[0]
    return Statement(items, relation, scene.background)


def describe(scene: Scene) -> str:
    """The canonical description: the target of image → text."""
    return write(full(scene))


def captions(scene: Scene, rng: Rng) -> list[tuple[str, str]]:
    """(kind, text), four to six: all true, each of the whole picture, and all but `full` varied in their wording.

    full       the canonical description
    objects    shapes, colors and counts: "a red circle and a blue star"
    background objects, with the background
    shapes     colors left open: "a circle and a star", "two circles"
    relation   of two different objects: "a red circle above a blue star"
    placed     of one or two objects: "a red circle in the top left and a blue star in the bottom right" """
    kinds = groups(scene)
    if rng.random() < 0.5:
        kinds = kinds[::-1]
    items = tuple(Item(count, *kind) for kind, count in kinds)
    shapes = Counter(shape for (shape, _), count in kinds for _ in range(count))
    by_shape = tuple(Item(count, shape) for shape, count in shapes.items())
    sometimes = scene.background if rng.random() < 0.25 else None
    told = [("objects", Statement(items)), ("background", Statement(items, None, scene.background)),
            ("shapes", Statement(by_shape, None, sometimes))]
    if len(items) == len(scene.objects) == 2:
        objects = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
        relation = pick(scene.world.relations(objects[0], objects[1]), rng)
        told.append(("relation", Statement(tuple(Item(1, *o.kind) for o in objects), relation, sometimes)))
    if len(scene.objects) <= 2:
        objects = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
        told.append(("placed", Statement(tuple(Item(1, *o.kind, place(scene, o)) for o in objects), None, sometimes)))
    return [("full", describe(scene)), *((kind, write(statement, rng)) for kind, statement in told)]
