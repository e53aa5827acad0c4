from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from data.scenes.detector import SPECK, Detection, Found, detect, scene_matches
from data.scenes.image import mask, render
from data.scenes.tasks import SKILLS, Prompt, prompts, score
from data.scenes.text import captions, describe, full, holds, parse
from data.scenes.world import BACKGROUNDS, COLORS, WORLDS, Object, Scene, World

LEVELS = sorted(WORLDS)
MANY = {1: 2000, 2: 500, 3: 500}
LEVEL_1 = World.at_level(1)


def exact(level: int, n: int, spoil: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda image: image) -> float:
    """The share of scenes that are read back from their pictures, one in ten of them with something held out."""
    world = World.at_level(level)
    splits = ["train"] * 18 + ["held_out_combinations", "held_out_pairs"]
    some = [world.scene(5, index, splits[index % 20]) for index in range(n)]
    return float(np.mean([scene_matches(scene, detect(spoil(render(scene)), world)) for scene in some]))


def one(shape: str, color: str, background: str = "white") -> Scene:
    return Scene(1, background, (Object(shape, color, 8, 9, 12),))


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_drawn_is_read_back(level: int) -> None:
    assert exact(level, MANY[level]) >= 0.998


@pytest.mark.parametrize("level", LEVELS)
def test_noise_of_28_decibels_and_blur_are_forgiven(level: int) -> None:
    rng = np.random.default_rng(0)

    def noisy(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.clip(image + rng.normal(0, 255 * 10 ** (-28 / 20), image.shape), 0, 255).astype(np.uint8)

    def blurred(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return ndimage.gaussian_filter(image.astype(np.float32), (0.5, 0.5, 0)).round().astype(np.uint8)

    assert exact(level, 200, noisy) >= 0.99 and exact(level, 200, blurred) >= 0.99


@pytest.mark.parametrize("shape", LEVEL_1.shapes)
@pytest.mark.parametrize("part", [np.s_[:, :8], np.s_[9:, :], np.s_[:9, 8:]])
def test_a_two_toned_object_has_no_color(shape: str, part: tuple[slice, slice]) -> None:
    whole, other = render(one(shape, "red")), render(one(shape, "blue"))
    whole[part] = other[part]
    assert [f for f in detect(whole, LEVEL_1).objects if f.color is not None and f.shape == shape] == []


@pytest.mark.parametrize("shape", LEVEL_1.shapes)
def test_half_an_object_has_no_shape(shape: str) -> None:
    for part in (np.s_[:, :8], np.s_[9:, :]):
        picture = render(one(shape, "red"))
        picture[part] = BACKGROUNDS["white"][0]
        assert shape not in {f.shape for f in detect(picture, LEVEL_1).objects}


@pytest.mark.parametrize("level", LEVELS)
def test_a_color_between_two_of_the_palette_is_none(level: int) -> None:
    world = World.at_level(level)
    picture = render(Scene(level, "black", (Object("square", "red", 8, 8, 12),)))
    picture[2:14, 2:14] = (np.array(COLORS["purple"]) + COLORS["yellow"]) // 2
    assert detect(picture, world).objects[0].color is None


@pytest.mark.parametrize("level", LEVELS)
def test_every_color_and_shape_is_read_on_every_background(level: int) -> None:
    world = World.at_level(level)
    for shape in world.shapes:
        for color in world.colors:
            for background in world.backgrounds:
                scene = Scene(level, background, (Object(shape, color, 8, 9, 12),))
                assert scene_matches(scene, detect(render(scene), world)), (shape, color, background)


def test_a_missing_an_extra_or_a_moved_object_does_not_match() -> None:
    scene = next(s for s in (LEVEL_1.scene(0, index) for index in range(50)) if len(s.objects) == 2)
    a, b = scene.objects
    for objects in ((a,), (a, b, Object("ring", "red", 8, 8, 12)), (a, Object(b.shape, b.color, b.x, b.y - 16, 12))):
        assert not scene_matches(Scene(1, scene.background, objects), detect(render(scene), LEVEL_1))


def test_a_speck_is_overlooked_and_a_blot_is_an_object() -> None:
    picture = render(one("circle", "red"))
    picture[20:22, 20:22] = 0
    assert SPECK == 4 and len(detect(picture, LEVEL_1).objects) == 1
    picture[20:22, 22] = 0
    assert [f.shape for f in detect(picture, LEVEL_1).objects] == ["circle", None]


def test_touching_objects_are_not_told_apart() -> None:
    objects = (Object("square", "red", 8, 8, 12), Object("square", "red", 20, 8, 12))
    found = detect(render(Scene(1, "white", objects)), LEVEL_1).objects
    assert [f.shape for f in found] == [None]


def test_a_picture_of_noise_or_of_one_color_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert all(f.shape is None for f in detect(noise, LEVEL_1).objects)
    assert detect(np.full((32, 32, 3), (255, 0, 255), np.uint8), LEVEL_1) == Detection(None, ())
    assert detect(np.full((32, 32, 3), 128, np.uint8), LEVEL_1) == Detection("gray", ())


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="level 1"):
        detect(np.zeros((48, 48, 3), np.uint8), LEVEL_1)


@pytest.mark.parametrize("level", LEVELS)
def test_a_picture_of_a_scene_satisfies_its_captions(level: int) -> None:
    world, rng = World.at_level(level), np.random.default_rng(0)
    for index in range(100):
        scene = world.scene(0, index)
        seen = detect(render(scene), world)
        for _, text in captions(scene, rng):
            statement = parse(text)
            assert statement and holds(statement, seen.objects, seen.background, world), text


@pytest.mark.parametrize("skill", SKILLS)
def test_a_prompt_is_satisfied_by_exactly_the_scenes_that_it_describes(skill: str) -> None:
    some = [LEVEL_1.scene(0, index) for index in range(600)]
    seen = [detect(render(scene), LEVEL_1) for scene in some]
    hits = 0
    for prompt in prompts(LEVEL_1, skill, "seen", 20, seed=0):
        wanted = [holds(prompt.statement, scene.objects, scene.background, LEVEL_1) for scene in some]
        assert [score(prompt, detection) for detection in seen] == wanted
        hits += sum(wanted)
    assert hits > 0


def test_what_is_wrong_in_one_thing_fails_a_prompt() -> None:
    some = (LEVEL_1.scene(0, index) for index in range(50))
    scene = next(s for s in some if full(s).relation == "above" and s.objects[0].color != s.objects[1].color)
    a, b = scene.objects
    right = Detection(scene.background, tuple(Found(o.shape, o.color, o.x, o.y) for o in (a, b)))
    said = Prompt(1, "position", describe(scene), full(scene))
    assert score(said, right)
    upside_down = tuple(Found(o.shape, o.color, o.x, 32 - o.y) for o in (a, b))
    swapped = (Found(a.shape, b.color, a.x, a.y), Found(b.shape, a.color, b.x, b.y))
    unclear = (Found(a.shape, None, a.x, a.y), right.objects[1])
    extra = (*right.objects, Found(None, None, 8, 8))
    for objects in (upside_down, swapped, unclear, right.objects[:1], extra):
        assert not score(said, Detection(scene.background, objects))
    assert not score(said, Detection(None, right.objects))


def test_coverage_is_that_of_the_outline() -> None:
    assert mask("square", 12)[:12, :12].min() > 0.99 and mask("square", 12)[12].max() == 0
    assert mask("circle", 12).sum() == pytest.approx(36 * np.pi, rel=0.02)
    assert mask("diamond", 12, 0.5, 0.5).sum() == pytest.approx(72, rel=0.02)
