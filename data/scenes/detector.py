"""Reads a picture back into a scene, strictly: what the model drew is scored by this program.

Everything rests on one ratio. A pixel's *coverage* by an object of color c on a background is
|p - background| / (|p - background| + |p - c|): exact for an antialiased edge, and for a textured background too, whose
pixels lie on a line between two colors. Shapes are told by comparing coverage with that of drawn ones.

Strict means: what cannot be read with confidence has shape or color None and so fails every comparison. Two-toned,
merged, torn, half-drawn or unknown objects do; only specks of up to `SPECK` pixels are overlooked.

Letters: h, w picture; n pixels of an object's window; t templates."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data.scenes.image import mask
from data.scenes.world import BACKGROUNDS, COLORS, Scene, World

Floats = NDArray[np.float32]

FOREGROUND = 50.0        # RGB distance: a pixel so far from the background belongs to something
SPECK = 4                # pixels: a component of no more is overlooked
BACKGROUND_SHARE = 0.25  # of the picture is background, or it has none that we know
MIN_SCORE = 0.78         # intersection over union with the best shape
MIN_MARGIN = 0.10        # and so much better than the next shape
COLOR_FAR = 62.0         # a pixel inside an object so far from its color is of another one
IMPURE_SHARE = 0.05      # of the pixels inside may be,
FADED_SHARE = 0.15       # and of those between it and the background, as blur makes them
COLOR_NEAR = 40.0        # the mean color inside is so near its color
NEAR = 4.0               # pixels from where an object should be


@dataclass(frozen=True)
class Found:
    """Something in a picture. Shape or color is None where it is unclear."""

    shape: str | None
    color: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Detection:
    background: str | None
    objects: tuple[Found, ...]


@dataclass(frozen=True)
class _Templates:
    """Each shape of a world in turn, at each size and at half-pixel steps about the middle of a window, where its
    center of mass is put."""

    coverage: Floats                # [t, n]
    total: Floats                   # [t]
    square: Floats                  # [t] sum of squares
    middle: Floats                  # [t, 2] x, y of the object's box, from the window's top left
    side: int


STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@cache
def _templates(shapes: tuple[str, ...], sizes: tuple[int, ...]) -> _Templates:
    side = max(sizes) + 8
    coverage: list[Floats] = []
    middle: list[tuple[float, float]] = []
    for shape in shapes:
        for size in sizes:
            whole = mask(shape, size)
            mass_y, mass_x = (np.indices(whole.shape) + 0.5).reshape(2, -1) @ whole.ravel() / whole.sum()
            for step_y in STEPS:
                for step_x in STEPS:
                    # the box's top left, on half pixels, that brings the center of mass to the middle plus the step
                    left, top = (round(2 * (side / 2 + step - mass)) / 2 for step, mass in
                                 ((step_x, mass_x), (step_y, mass_y)))
                    window = np.zeros((side, side), np.float32)
                    rows, columns = slice(int(top), int(top) + size + 1), slice(int(left), int(left) + size + 1)
                    window[rows, columns] = mask(shape, size, left % 1, top % 1)
                    coverage.append(window.ravel())
                    middle.append((left + size / 2, top + size / 2))
    stacked = np.stack(coverage)
    return _Templates(stacked, stacked.sum(1), (stacked ** 2).sum(1), np.array(middle, np.float32), side)


def _length(vectors: Floats) -> Floats:
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))


def _far(pixels: Floats, background: str, textured: bool) -> Floats:
    """Distance to the background's color, or to the line between its two: [..., 3] -> [...]."""
    a, b = np.array(BACKGROUNDS[background], np.float32)
    away = pixels - a
    if textured:
        along = np.clip(away @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        away -= along[..., None] * (b - a)
    return _length(away)


def detect(image: NDArray[np.uint8], world: World) -> Detection:
    """What is in a picture [h, w, 3]."""
    if image.shape != (world.image_size, world.image_size, 3):
        raise ValueError(f"a picture of shape {image.shape} is not of level {world.level}, "
                         f"which has {world.image_size} x {world.image_size} x 3: detect at its own level")
    pixels = image.astype(np.float32)
    far_from = {name: _far(pixels, name, world.textured) for name in world.backgrounds}
    background = max(world.backgrounds, key=lambda name: np.count_nonzero(far_from[name] < FOREGROUND))
    far = far_from[background]
    if np.mean(far < FOREGROUND) < BACKGROUND_SHARE:
        return Detection(None, ())
    labels = np.zeros(far.shape, np.int32)
    ndimage.label(far >= FOREGROUND, structure=np.ones((3, 3)), output=labels)
    below = np.array(BACKGROUNDS[background][0], np.float32)
    found: list[Found] = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = slice(max(rows.start - 1, 0), rows.stop + 1), slice(max(columns.start - 1, 0), columns.stop + 1)
        of = labels[rows, columns]
        if np.count_nonzero(of == label) > SPECK:
            near = np.where((of == label) | (of == 0), far[rows, columns], 0)
            found.append(_read(pixels[rows, columns], near, below, columns.start, rows.start, world))
    return Detection(background, tuple(found))


def _read(pixels: Floats, far: Floats, below: Floats, left: int, top: int, world: World) -> Found:
    """One component: its pixels [h, w, 3] and their distance from the background [h, w], 0 where others are."""
    deepest = np.argsort(far, axis=None)[-max(6, np.count_nonzero(far >= FOREGROUND) // 3):]
    typical = np.sort(pixels.reshape(-1, 3)[deepest], axis=0)[len(deepest) // 2]        # median, channel by channel
    palette = np.array([COLORS[name] for name in world.colors], np.float32)
    color = int(np.argmin(_length(palette - typical)))
    off = _length(pixels - palette[color])              # [h, w]
    coverage = far / (far + off + 1e-6)
    coverage = np.clip(1.25 * coverage - 0.125, 0, 1)                   # a tenth of noise at either end
    mass, (h, w) = coverage.sum(), coverage.shape
    x, y = coverage.sum(0) @ (np.arange(w) + 0.5) / mass, coverage.sum(1) @ (np.arange(h) + 0.5) / mass

    t = _templates(world.shapes, world.sizes)
    dx, dy = round(t.side / 2 - x), round(t.side / 2 - y)               # from the component's box to the window's
    if min(dx, dy) < 0 or max(dx + w, dy + h) > t.side:
        return Found(None, None, left + x, top + y)                     # larger than any object
    window = np.zeros((t.side, t.side), np.float32)
    window[dy:dy + h, dx:dx + w] = coverage
    window = window.ravel()
    unlike = (t.square - 2 * t.coverage @ window).reshape(len(world.shapes), -1)
    placed = unlike.argmin(1) + np.arange(len(unlike)) * unlike.shape[1]    # the best placement of each shape
    shared = np.minimum(t.coverage[placed], window).sum(1)
    scores = shared / (t.total[placed] + window.sum() - shared)
    shape, second = np.argsort(-scores)[:2]
    best = placed[shape]
    clear = scores[shape] >= MIN_SCORE and scores[shape] - scores[second] >= MIN_MARGIN

    inside = t.coverage[best].reshape(t.side, t.side)[dy:dy + h, dx:dx + w] > 0.99
    wrong = off[inside] > COLOR_FAR
    faded = far[inside] + off[inside] < 1.15 * _length(palette[color] - below)
    pure = (np.mean(wrong & ~faded) <= IMPURE_SHARE and np.mean(wrong) <= FADED_SHARE
            and _length(pixels[inside].mean(0) - palette[color]) <= COLOR_NEAR)
    middle_x, middle_y = t.middle[best]
    return Found(world.shapes[shape] if clear else None, world.colors[color] if pure else None,
                 float(left - dx + middle_x), float(top - dy + middle_y))


def scene_matches(scene: Scene, detection: Detection) -> bool:
    """Whether a picture shows the scene: its background, each object of shape and color near its place, no other."""
    if scene.background != detection.background or len(scene.objects) != len(detection.objects):
        return False
    return any(all(o.shape == f.shape and o.color == f.color and max(abs(o.x - f.x), abs(o.y - f.y)) <= NEAR
                   for o, f in zip(scene.objects, order, strict=True)) for order in permutations(detection.objects))
