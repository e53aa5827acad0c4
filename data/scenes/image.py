"""Draws a scene: antialiased shapes of one flat color on a plain or textured background.

A shape is an outline, and for the ring a hole, in a box from -1 to 1. Its coverage of each pixel is drawn once
per size and half-pixel offset, large, and averaged down; on a plain background the blended patch is kept too, and a
picture is then a few copies."""

from functools import cache
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data.scenes.world import BACKGROUNDS, COLORS, Object, Scene

SUPERSAMPLE = 16
Outline = list[tuple[float, float]]


def _circle(radius: float) -> Outline:
    return [(radius * cos(a * pi / 48), radius * sin(a * pi / 48)) for a in range(96)]


def _star(inner: float) -> Outline:
    radius = (1.1, inner)
    return [(radius[i % 2] * sin(i * pi / 5), 0.1 - radius[i % 2] * cos(i * pi / 5)) for i in range(10)]


def _cross(a: float) -> Outline:
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


def _heart() -> Outline:
    turn = [i * pi / 48 for i in range(96)]
    return [(sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 14.5 - 0.15) for t in turn]


OUTLINES: dict[str, tuple[Outline, ...]] = {  # what is filled, then what is cut out of it
    "circle": (_circle(1),),
    "square": ([(-1, -1), (1, -1), (1, 1), (-1, 1)],),
    "triangle": ([(0, -1), (1, 1), (-1, 1)],),
    "star": (_star(0.45),),
    "cross": (_cross(1 / 3),),
    "ring": (_circle(1), _circle(0.5)),
    "diamond": ([(0, -1), (1, 0), (0, 1), (-1, 0)],),
    "heart": (_heart(),),
}


@cache
def mask(shape: str, size: int, dx: float = 0.0, dy: float = 0.0) -> NDArray[np.float32]:
    """Coverage of each pixel, in [0, 1]: [size + 1, size + 1], the box of the shape `dx`, `dy` from its top left."""
    side = size + 1
    image = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    draw = ImageDraw.Draw(image)
    for level, outline in zip((255, 0), OUTLINES[shape], strict=False):
        points = [(((x + 1) * size / 2 + dx) * SUPERSAMPLE - 0.5, ((y + 1) * size / 2 + dy) * SUPERSAMPLE - 0.5)
                  for x, y in outline]
        draw.polygon(points, fill=level)
    fine = np.asarray(image, dtype=np.float32).reshape(side, SUPERSAMPLE, side, SUPERSAMPLE)
    return fine.mean(axis=(1, 3)) / 255


def _corner(o: Object) -> tuple[int, int, float, float]:
    left, top = o.x - o.size / 2, o.y - o.size / 2
    return int(left), int(top), left % 1, top % 1


@cache
def _patch(shape: str, color: str, background: str, size: int, dx: float, dy: float) -> NDArray[np.uint8]:
    coverage = mask(shape, size, dx, dy)[..., None]                     # [side, side, 1]
    over, below = np.array([COLORS[color], BACKGROUNDS[background][0]], np.float32)
    return np.rint(below + coverage * (over - below)).astype(np.uint8)


def _texture(background: str, side: int, texture: int) -> NDArray[np.float32]:
    """Stripes, checks, dots, a smooth random field or nothing, between the background's two colors: [side, side, 3]."""
    a, b = np.array(BACKGROUNDS[background], np.float32)
    rng = np.random.default_rng(texture)
    style, period, turn, phase = rng.integers(5), rng.uniform(5, 10), rng.uniform(0, pi), rng.uniform(0, 2 * pi, 2)
    x, y = np.arange(side) * 2 * pi / period, np.arange(side)[:, None] * 2 * pi / period
    along, across = np.sin(x * cos(turn) + y * sin(turn) + phase[0]), np.sin(y * cos(turn) - x * sin(turn) + phase[1])
    if style == 0:
        share = along / 2 + 0.5
    elif style == 1:
        share = along * across / 2 + 0.5
    elif style == 2:
        share = np.clip(2 * (along + across) - 2, 0, 1)
    elif style == 3:
        coarse = Image.fromarray((255 * rng.random((9, 9))).astype(np.uint8))
        share = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 255
    else:
        share = np.zeros((side, side))
    return a + share[..., None].astype(np.float32) * (b - a)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture: [h, w, 3]."""
    side = scene.world.image_size
    if scene.texture:
        canvas = _texture(scene.background, side, scene.texture)
        for o in scene.objects:
            left, top, dx, dy = _corner(o)
            coverage = mask(o.shape, o.size, dx, dy)[..., None]
            below = canvas[top:top + o.size + 1, left:left + o.size + 1]
            below += coverage * (np.array(COLORS[o.color], np.float32) - below)
        return np.rint(canvas).astype(np.uint8)
    image = np.empty((side, side, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background][0]
    for o in scene.objects:
        left, top, dx, dy = _corner(o)
        image[top:top + o.size + 1, left:left + o.size + 1] = _patch(o.shape, o.color, scene.background, o.size, dx, dy)
    return image
