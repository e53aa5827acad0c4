"""The procedural world of the quick start: what a scene is, and which scenes training may see.

A *kind* is what an object is: (shape, color). An *object* is a kind at a place. A scene is one to a few objects
on a background, and a pure function of (seed, index, split): no state, no stream, any order, any worker.

The four splits partition all scenes: every scene belongs to exactly one, see `World.split_of`.

    held_out_pairs          has a kind (shape–color pair) that training never sees
    held_out_combinations   every kind is trained, but two of them are never seen in one picture (a *couple*; two of one
                            kind are a couple too), or one of them is never seen in this cell in this relation to
                            another object (a *triple*: kind, cell, relation; "a red circle, top left, above something")
    seen, train             nothing held out; told apart by a hash of the whole scene, so that no seen scene was ever
                            trained on, though one that differs by a pixel of jitter or by the background may have been

A single object has no couple and no relation, so it is never a held-out combination. Lengths are pixels; x grows to
the right and y downwards; an object's x, y are the middle of the box of side `size` that it is drawn in."""

import hashlib
import itertools
import math
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Kind = tuple[str, str]                      # (shape, color)
Couple = tuple[Kind, Kind]                  # sorted: unordered
Triple = tuple[Kind, int, str]              # (kind, cell, relation to some other object)
RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLORS: dict[str, RGB] = {
    "red": (225, 25, 30), "green": (25, 150, 45), "blue": (30, 60, 235), "yellow": (250, 220, 25),
    "purple": (145, 35, 185), "cyan": (40, 215, 225), "orange": (250, 130, 15), "pink": (255, 135, 195),
}
BACKGROUNDS: dict[str, tuple[RGB, RGB]] = {  # plain uses the first; a texture runs between the two
    "white": ((250, 250, 250), (215, 215, 215)), "black": ((10, 10, 10), (50, 50, 50)),
    "gray": ((128, 128, 128), (100, 100, 100)), "navy": ((20, 30, 95), (40, 50, 120)),
}
RELATIONS = ("above", "below", "left of", "right of")
SPLITS = ("train", "seen", "held_out_combinations", "held_out_pairs")
PAIRS_SHARE = 0.10            # of the kinds
COMBINATIONS_SHARE = 0.13     # of the couples and triples of trained kinds: over .10 of those of all kinds too
SEEN_SHARE = 8                # one scene in so many is kept from training to measure "seen"
MAX_DRAWS = 20_000


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    x: float
    y: float
    size: int

    @property
    def kind(self) -> Kind:
        return self.shape, self.color


class Rng(Protocol):
    """`random.Random` or a numpy Generator."""

    def random(self) -> float: ...


class Placed(Protocol):
    """An object of a scene, or one that the detector found; of that one shape or color may be unclear."""

    @property
    def shape(self) -> str | None: ...
    @property
    def color(self) -> str | None: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


@dataclass(frozen=True)
class Scene:
    level: int
    background: str
    objects: tuple[Object, ...]
    """In reading order of their cells."""
    texture: int = 0
    """Chooses the texture and its phase; 0 is plain."""

    @property
    def world(self) -> "World":
        return WORLDS[self.level]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps` or inside a sample's own JSON."""
        objects = [[o.shape, o.color, o.x, o.y, o.size] for o in self.objects]
        return {"level": self.level, "background": self.background, "texture": self.texture, "objects": objects}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Scene":
        objects = tuple(Object(*o) for o in values["objects"])
        return Scene(values["level"], values["background"], objects, values["texture"])


@dataclass(frozen=True, kw_only=True)
class World:
    """A level is one of these: `WORLDS[level]`, or `World.at_level(level)` with an error for a wrong one."""

    level: int
    image_size: int
    """Height and width of a picture."""
    cells: int
    """Cells a side. They name places ("top left"), and unless `free` each object sits in the middle of one."""
    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    backgrounds: tuple[str, ...]
    patterns: dict[tuple[int, ...], float]
    """Numbers of objects by kind, and the weight of drawing so: (2, 1) is two of one kind and one of another."""
    sizes: tuple[int, ...] = (12,)
    jitter: tuple[int, ...] = (0,)
    """Offsets from the middle of the cell, drawn for x and y of each object."""
    free: bool = False
    """Objects anywhere, on half pixels, `gap` apart."""
    gap: int = 3
    textured: bool = False
    relation_questions: bool = True
    relation_margin: int = 6
    """"Above" and the others are stated of middles at least so far apart in that direction."""

    @staticmethod
    def at_level(level: int) -> "World":
        if level not in WORLDS:
            raise ValueError(f"level {level} is not one of the scene levels {sorted(WORLDS)}: change --level")
        return WORLDS[level]

    # ---- what there is ------------------------------------------------------------------------------------------

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(itertools.product(self.shapes, self.colors))

    @cached_property
    def trained_kinds(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in self.kinds if kind not in self.held_out_pairs)

    def cell(self, x: float, y: float) -> int:
        """The cell that holds a point of the picture, in reading order."""
        return int(y * self.cells / self.image_size) * self.cells + int(x * self.cells / self.image_size)

    def relations(self, a: "Placed", b: "Placed", margin: float | None = None) -> list[str]:
        """What is true of `a` to `b`; of two in a diagonal both are, "above" and "left of"."""
        right, down, far = b.x - a.x, b.y - a.y, self.relation_margin if margin is None else margin
        names: list[str] = []
        if abs(down) >= far:
            names.append("above" if down > 0 else "below")
        if abs(right) >= far:
            names.append("left of" if right > 0 else "right of")
        return names

    # ---- what is held out ---------------------------------------------------------------------------------------

    @cached_property
    def held_out_pairs(self) -> frozenset[Kind]:
        """Shape–color pairs: one to a shape and to a color, as long as that suffices."""
        return _spread(self.kinds, PAIRS_SHARE, lambda kind: kind)

    @cached_property
    def couples(self) -> tuple[Couple, ...]:
        return tuple((a, b) for a, b in itertools.combinations_with_replacement(sorted(self.trained_kinds), 2))

    @cached_property
    def held_out_couples(self) -> frozenset[Couple]:
        """The share is kept among couples of one kind too: counting one kind would else lose more than the rest."""
        same = [couple for couple in self.couples if couple[0] == couple[1]]
        other = [couple for couple in self.couples if couple[0] != couple[1]]
        return _spread(same, COMBINATIONS_SHARE, lambda couple: couple[0]) | _spread(other, COMBINATIONS_SHARE, set)

    @cached_property
    def triples(self) -> tuple[Triple, ...]:
        """Those that can occur: nothing in the top row is below anything."""
        n = self.cells
        possible = {"above": lambda row, column: row < n - 1, "below": lambda row, column: row > 0,
                    "left of": lambda row, column: column < n - 1, "right of": lambda row, column: column > 0}
        return tuple((kind, cell, relation) for kind in self.trained_kinds for cell in range(n * n)
                     for relation in RELATIONS if possible[relation](*divmod(cell, n)))

    @cached_property
    def held_out_triples(self) -> frozenset[Triple]:
        return _spread(self.triples, COMBINATIONS_SHARE, lambda triple: (triple[0], (triple[0], triple[2])))

    def couples_of(self, kinds: Sequence[Kind]) -> list[Couple]:
        return [(a, b) if a <= b else (b, a) for a, b in itertools.combinations(kinds, 2)]

    def triples_of(self, objects: Sequence[Object]) -> list[Triple]:
        cells = [self.cell(o.x, o.y) for o in objects]
        return [(a.kind, cell, relation) for a, cell in zip(objects, cells, strict=True) for b in objects if b is not a
                for relation in self.relations(a, b)]

    def held_out_in(self, kinds: Sequence[Kind]) -> str | None:
        """The hold-out that kinds in one picture are of, wherever they are, or None; two of a kind are given twice."""
        if not self.held_out_pairs.isdisjoint(kinds):
            return "held_out_pairs"
        return None if self.held_out_couples.isdisjoint(self.couples_of(kinds)) else "held_out_combinations"

    def split_of(self, scene: Scene) -> str:
        """The one split that a scene belongs to."""
        if held_out := self.held_out_in([o.kind for o in scene.objects]):
            return held_out
        if not self.held_out_triples.isdisjoint(self.triples_of(scene.objects)):
            return "held_out_combinations"
        return "seen" if _kept_from_training(scene) else "train"

    # ---- drawing one ----------------------------------------------------------------------------------------------

    def scene(self, seed: int, index: int, split: str = "train") -> Scene:
        """Scene number `index` of a split: drawn again, its pattern kept, until it falls into the split."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        rng = Random(f"{seed}/{split}/{index}")                         # a third of the time of numpy's, and as stable
        patterns, weights = self._patterns_of_several if split == "held_out_combinations" else self._patterns
        pattern = patterns[bisect(weights, rng.random() * weights[-1])]
        for _ in range(MAX_DRAWS):
            kinds = self._draw_kinds(rng, pattern, split)
            if kinds is None:
                continue
            scene = self._draw_scene(rng, kinds)
            if scene is None or (split == "seen" and not _kept_from_training(scene)):
                continue                                                # cheap, before the combinations are looked up
            if self.split_of(scene) == split:
                return scene
        raise ValueError(f"no {split} scene of pattern {pattern} in {MAX_DRAWS:,} draws at level {self.level}: "
                         "hold out less, or drop the pattern")

    @cached_property
    def _patterns(self) -> tuple[list[tuple[int, ...]], list[float]]:
        return list(self.patterns), list(itertools.accumulate(self.patterns.values()))

    @cached_property
    def _patterns_of_several(self) -> tuple[list[tuple[int, ...]], list[float]]:
        several = {pattern: weight for pattern, weight in self.patterns.items() if sum(pattern) > 1}
        return list(several), list(itertools.accumulate(several.values()))

    def _draw_kinds(self, rng: Random, pattern: tuple[int, ...], split: str) -> list[Kind] | None:
        chosen = [pick(self.trained_kinds, rng) for _ in pattern]
        if split == "held_out_pairs":
            chosen[int(rng.random() * len(chosen))] = pick(sorted(self.held_out_pairs), rng)
        kinds = [kind for kind, count in zip(chosen, pattern, strict=True) for _ in range(count)]
        if len(set(chosen)) < len(chosen):
            return None
        if split in ("train", "seen") and self.held_out_in(kinds):
            return None                                                 # cheap, before the objects are placed
        return kinds

    def _draw_scene(self, rng: Random, kinds: list[Kind]) -> Scene | None:
        objects = self._draw_free(rng, kinds) if self.free else self._draw_in_cells(rng, kinds)
        if objects is None:
            return None
        if len(objects) > 1:
            objects.sort(key=lambda o: (self.cell(o.x, o.y), o.y, o.x))
        background = pick(self.backgrounds, rng)
        return Scene(self.level, background, tuple(objects), 1 + int(rng.random() * 2**31) if self.textured else 0)

    def _draw_in_cells(self, rng: Random, kinds: list[Kind]) -> list[Object]:
        n, side = self.cells, self.image_size // self.cells
        u = [rng.random() for _ in range(n * n)]
        cells = sorted(range(n * n), key=u.__getitem__)                 # a shuffle
        objects: list[Object] = []
        for (shape, color), cell in zip(kinds, cells, strict=False):
            x = cell % n * side + side // 2 + pick(self.jitter, rng)
            y = cell // n * side + side // 2 + pick(self.jitter, rng)
            objects.append(Object(shape, color, x, y, pick(self.sizes, rng)))
        return objects

    def _draw_free(self, rng: Random, kinds: list[Kind]) -> list[Object] | None:
        objects: list[Object] = []
        for shape, color in kinds:
            size = pick(self.sizes, rng)
            x, y = (1 + size / 2 + int(rng.random() * 2 * (self.image_size - size - 2)) / 2 for _ in "xy")
            if any(max(abs(o.x - x), abs(o.y - y)) < (o.size + size) / 2 + self.gap for o in objects):
                return None
            objects.append(Object(shape, color, x, y, size))
        return objects


def pick(items: Sequence[T], rng: Rng) -> T:
    return items[int(rng.random() * len(items))]


def _kept_from_training(scene: Scene) -> bool:
    what = repr([scene.background, *((o.shape, o.color, o.x, o.y, o.size) for o in scene.objects)])
    return zlib.crc32(what.encode()) % SEEN_SHARE == 0


def _spread(items: Sequence[T], share: float, uses: Callable[[T], Iterable[Any]]) -> frozenset[T]:
    """A share of the items, so that what they use is used about equally often; in an order that never changes."""
    shuffled = sorted(items, key=lambda item: hashlib.blake2b(repr(item).encode()).digest())
    wanted, chosen, used = math.ceil(share * len(items)), set[T](), Counter[Any]()
    for limit in itertools.count(1):
        for item in shuffled:
            if len(chosen) == wanted:
                return frozenset(chosen)
            if item not in chosen and all(used[use] < limit for use in uses(item)):
                chosen.add(item)
                used.update(uses(item))
    raise AssertionError("the limit grows until enough are chosen")


_COLORS = tuple(COLORS)
_FEW = {(1,): 0.20, (1, 1): 0.45, (2,): 0.10, (3,): 0.10, (2, 1): 0.15}
_MANY = {(1,): 0.12, (1, 1): 0.30, (2,): 0.08, (3,): 0.08, (2, 1): 0.12, (1, 1, 1): 0.10,
         (4,): 0.05, (3, 1): 0.05, (2, 2): 0.05, (2, 1, 1): 0.05}

WORLDS: dict[int, World] = {world.level: world for world in (
    # minutes on two cores: an object covers 2 x 2 patches of 8 pixels, at one of four offsets
    World(level=1, image_size=32, cells=2, jitter=(0, 1), shapes=SHAPES[:6], colors=_COLORS[:6],
          backgrounds=("white", "black", "gray"), patterns=_FEW, relation_questions=False),
    # an hour
    World(level=2, image_size=48, cells=3, jitter=(-1, 0, 1), shapes=SHAPES, colors=_COLORS,
          backgrounds=tuple(BACKGROUNDS), patterns=_MANY),
    # longer runs and GPUs
    World(level=3, image_size=64, cells=3, free=True, sizes=(12, 18), textured=True, shapes=SHAPES, colors=_COLORS,
          backgrounds=tuple(BACKGROUNDS), patterns=_MANY),
)}
