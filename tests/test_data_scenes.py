import json
from random import Random

import numpy as np
import pytest

from data.scenes.image import render
from data.scenes.tasks import SKILLS_OF, prompts, questions
from data.scenes.text import caption_exact, captions, describe, holds, parse, place, write
from data.scenes.world import SPLITS, WORLDS, Scene, World

LEVELS = sorted(WORLDS)
MANY = {1: 20_000, 2: 4_000, 3: 1_000}


FIRST = {
    1: "a yellow square above a purple triangle on a white background",
    2: "a blue heart above a blue circle on a white background",
    3: "a pink cross above a blue heart on a navy background",
}


def scenes(level: int, n: int, split: str = "train", seed: int = 0) -> list[Scene]:
    return [World.at_level(level).scene(seed, index, split) for index in range(n)]


def every_text(scene: Scene, rng: Random) -> list[str]:
    asked = questions(scene, rng)
    return [text for _, text in captions(scene, rng)] + [q.question for q in asked] + [q.answer for q in asked]


@pytest.mark.parametrize("level", LEVELS)
def test_a_scene_is_a_pure_function_of_seed_index_and_split(level: int) -> None:
    forwards = scenes(level, 30)
    world = World.at_level(level)
    assert [world.scene(0, index) for index in reversed(range(30))] == forwards[::-1]
    assert scenes(level, 30, seed=1) != forwards
    assert np.array_equal(render(forwards[3]), render(world.scene(0, 3)))


def test_scenes_do_not_change_between_releases() -> None:
    assert {level: describe(World.at_level(level).scene(0, 0)) for level in LEVELS} == FIRST


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_scene_of_a_split_belongs_to_it_and_to_no_other(level: int, split: str) -> None:
    world = World.at_level(level)
    assert {world.split_of(scene) for scene in scenes(level, 100, split)} == {split}


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_held_out_occurs_in_training(level: int) -> None:
    world = World.at_level(level)
    for scene in scenes(level, MANY[level]):
        kinds = [(o.shape, o.color) for o in scene.objects]
        assert not any(kind in world.held_out_pairs for kind in kinds)
        for i, a in enumerate(scene.objects):
            for j, b in enumerate(scene.objects):
                if i != j:
                    assert tuple(sorted((kinds[i], kinds[j]))) not in world.held_out_couples
                    for relation in world.relations(a, b):
                        assert (kinds[i], world.cell(a.x, a.y), relation) not in world.held_out_triples


@pytest.mark.parametrize("level", LEVELS)
def test_each_hold_out_is_at_least_a_tenth_counted_among_all_kinds(level: int) -> None:
    world = World.at_level(level)
    kinds, cells = len(world.kinds), world.cells ** 2
    possible = cells * 4 - 4 * world.cells                        # cell and relation: none is above the top row
    assert len(world.triples) == (kinds - len(world.held_out_pairs)) * possible
    assert len(world.held_out_pairs) >= 0.1 * kinds
    assert len(world.held_out_couples) >= 0.1 * kinds * (kinds + 1) / 2
    assert len(world.held_out_triples) >= 0.1 * kinds * possible


@pytest.mark.parametrize("level", LEVELS)
def test_held_out_pairs_take_at_most_one_from_each_shape_and_color(level: int) -> None:
    shapes, colors = zip(*World.at_level(level).held_out_pairs, strict=True)
    assert len(set(shapes)) == len(shapes) and len(set(colors)) == len(colors)


@pytest.mark.parametrize("level", LEVELS)
def test_every_trained_kind_keeps_every_relation_and_is_trained_often(level: int) -> None:
    world = World.at_level(level)
    kept = {(kind, relation) for kind, cell, relation in world.triples
            if (kind, cell, relation) not in world.held_out_triples}
    assert kept == {(kind, relation) for kind, _, relation in world.triples}
    seen = [(o.shape, o.color) for scene in scenes(level, 1000) for o in scene.objects]
    assert all(seen.count(kind) >= 10 for kind in world.trained_kinds)


def test_no_seen_scene_is_trained_on() -> None:
    def what(scene: Scene) -> str:
        return json.dumps({**scene.to_json(), "texture": 0})

    assert not {what(s) for s in scenes(1, 5_000)} & {what(s) for s in scenes(1, 500, "seen")}


@pytest.mark.parametrize("level", LEVELS)
def test_no_training_text_names_a_held_out_pair(level: int) -> None:
    names = [f"{color} {shape}" for shape, color in World.at_level(level).held_out_pairs]
    rng = Random(0)
    for scene in scenes(level, 1000):
        assert not [text for text in every_text(scene, rng) for name in names if name in text]


@pytest.mark.parametrize("level", LEVELS)
def test_every_caption_is_understood_true_and_exact_unless_it_leaves_colors_open(level: int) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(level, 300) + scenes(level, 100, "held_out_pairs"):
        told = captions(scene, rng)
        assert told[0] == ("full", describe(scene)) and 4 <= len(told) <= 6
        for kind, text in told:
            statement = parse(text)
            assert statement and holds(statement, scene.objects, scene.background, scene.world), text
            assert caption_exact(text, scene) == (kind != "shapes"), text


@pytest.mark.parametrize("level", LEVELS)
def test_a_description_is_exact_only_for_scenes_that_are_described_alike(level: int) -> None:
    some = scenes(level, 70)
    for a in some:
        for b in some:
            if caption_exact(describe(a), b):
                assert sorted(o.kind for o in a.objects) == sorted(o.kind for o in b.objects)
                assert a.background == b.background


@pytest.mark.parametrize("level", LEVELS)
def test_parse_inverts_every_wording_of_a_prompt(level: int) -> None:
    for split, skills in SKILLS_OF.items():
        for skill in skills:
            assert all(parse(p.text) == p.statement for p in prompts(World.at_level(level), skill, split, 100, seed=0))


@pytest.mark.parametrize("text", [
    "", "a", "circle", "red circle", "a red", "an red circle", "a orange circle", "two red circle", "a red circles",
    "a red circle and", "and a red circle", "a red circle above", "above a red circle", "a red red circle",
    "a red circle a blue star", "a red circle above two blue stars", "a circle on a red background", "five red circles",
    "a red circle in the", "a red circle above a blue star above a red ring", "two red circles in the top left",
])
def test_what_is_not_one_of_our_sentences_is_not_understood(text: str) -> None:
    assert parse(text) is None


def test_a_false_relation_place_or_background_makes_a_description_wrong() -> None:
    scene = next(s for s in scenes(1, 50) if parse(describe(s)).relation == "above" and s.background == "white")
    words = describe(scene)
    for wrong in (words.replace("above", "below"), words.replace("white", "black"), words[:-1]):
        assert not caption_exact(wrong, scene)
    single = next(s for s in scenes(1, 50) if len(s.objects) == 1)
    where = place(single, single.objects[0])
    elsewhere = describe(single).replace(where, "top left" if where != "top left" else "top right")
    assert caption_exact(describe(single), single) and not caption_exact(elsewhere, single)


@pytest.mark.parametrize("level", LEVELS)
def test_the_answers_are_right(level: int) -> None:
    rng = Random(0)
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for scene in scenes(level, 400) + scenes(level, 100, "held_out_combinations"):
        for q in questions(scene, rng):
            words = set(q.question.rstrip("?").replace("crosses", "cross").split())
            words |= {word.removesuffix("s") for word in words if word != "cross"}
            named = [o for o in scene.objects if (o.shape in words or not words & set(scene.world.shapes))
                     and (o.color in words or not words & set(scene.world.colors))]
            if q.kind in ("shape", "color", "position"):
                only, = named
                assert q.answer == {"shape": only.shape, "color": only.color}.get(q.kind, place(scene, only))
            elif q.kind == "count":
                assert numbers[q.answer] == len(named)
            elif q.kind in ("exists", "binding"):
                assert q.answer == ("yes" if named else "no")
            elif q.kind == "background":
                assert q.answer == scene.background


def test_yes_and_no_are_equally_likely() -> None:
    rng = Random(0)
    answers = [(q.kind, q.answer) for scene in scenes(2, 2000) for q in questions(scene, rng)]
    for kind in ("exists", "binding", "relation"):
        yes, no = answers.count((kind, "yes")), answers.count((kind, "no"))
        assert 0.45 < yes / (yes + no) < 0.55


def test_level_1_asks_no_relations_and_never_lists_three() -> None:
    rng = Random(0)
    for scene in scenes(1, 500):
        assert "relation" not in {q.kind for q in questions(scene, rng)}
        assert not [text for _, text in captions(scene, rng) if "," in text]


@pytest.mark.parametrize("level", LEVELS)
def test_prompts_name_what_their_split_holds_out(level: int) -> None:
    world = World.at_level(level)
    for split, skills in SKILLS_OF.items():
        for skill in skills:
            told = prompts(world, skill, split, 100, seed=0)
            assert told == prompts(world, skill, split, 100, seed=0) and len({p.text for p in told}) >= 60
            for prompt in told:
                items = prompt.statement.items
                if all(item.color for item in items):
                    kinds = [(item.shape, item.color) for item in items for _ in range(item.count)]
                    assert (world.held_out_in(kinds) or "seen") == split       # type: ignore[arg-type]
                else:
                    assert split == "seen"


def test_a_skill_that_can_name_nothing_held_out_is_refused() -> None:
    with pytest.raises(ValueError, match="single_object"):
        prompts(World.at_level(1), "single_object", "held_out_pairs", 1, seed=0)


@pytest.mark.parametrize("level", LEVELS)
def test_a_scene_survives_json(level: int) -> None:
    for scene in scenes(level, 50):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@pytest.mark.parametrize("level", LEVELS)
def test_objects_keep_apart_and_inside_the_picture(level: int) -> None:
    world = World.at_level(level)
    for scene in scenes(level, 300):
        for i, a in enumerate(scene.objects):
            assert a.size / 2 <= min(a.x, a.y) and max(a.x, a.y) <= world.image_size - a.size / 2
            for b in scene.objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 + 2


def test_the_canonical_wording_is_one_of_the_wordings() -> None:
    statement = parse("a red circle above a blue star on a white background")
    assert statement and write(statement) in {write(statement, Random(seed)) for seed in range(200)}


@pytest.mark.parametrize("wrong", [0, 4])
def test_a_level_that_does_not_exist_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"level {wrong}"):
        World.at_level(wrong)


def test_a_split_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="'test'"):
        World.at_level(1).scene(0, 0, "test")

