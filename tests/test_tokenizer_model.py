"""The visual tokenizer encodes, decodes, trains and survives its folder."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from small_world import RECIPE, small_world

from data.images import to_tensor
from data.scene_image import render
from data.scenes import World
from mmllm.runs.train_tokenizer import train_teacher, usable_rows
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.semantic import Teacher, TowerConfig


def pictures(count: int = 6) -> torch.Tensor:
    world = World.at_level(1)
    return torch.stack([to_tensor(render(world.scene(5, i))) for i in range(count)])


def test_codes_have_a_book_a_row_and_a_column() -> None:
    codes = small_world().visual.encode(pictures())
    assert codes.shape == (6, 2, 4, 4) and codes.dtype == torch.int32 and codes.min() >= 0 and codes.max() < 64


def test_reconstruction_is_close() -> None:
    x, visual = pictures(), small_world().visual
    assert (visual.decode(visual.encode(x)) - x).square().mean() < 0.05


def test_codes_do_not_depend_on_the_batch() -> None:
    x, visual = pictures(), small_world().visual
    assert torch.equal(visual.encode(x), torch.cat([visual.encode(one[None]) for one in x]))


def test_saved_and_loaded_gives_the_same_codes_and_fingerprint(tmp_path: Path) -> None:
    visual, x = small_world().visual, pictures()
    visual.save(tmp_path / "v")
    loaded = VisualTokenizer.load(tmp_path / "v")
    assert loaded.fingerprint == visual.fingerprint and torch.equal(loaded.encode(x), visual.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), visual.decode(visual.encode(x)))


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    visual = VisualTokenizer.load(small_world().visual_folder)
    with torch.no_grad():
        visual.quantizer.pixel_tables[0][0, 0] += 1e-3
    visual.save(tmp_path / "v")
    assert visual.fingerprint != small_world().visual.fingerprint


def test_every_trained_part_gets_a_gradient_and_the_tower_none() -> None:
    visual = VisualTokenizer.load(small_world().visual_folder).train()
    for name, parameter in visual.named_parameters():
        parameter.requires_grad_(not name.startswith("semantic_tower"))
    visual(pictures()).total.backward()
    for name, parameter in visual.named_parameters():
        assert (parameter.grad is None) == name.startswith("semantic_tower"), name


def test_codes_are_named_by_words_of_the_captions() -> None:
    world = small_world()
    names = {world.text.processor.id_to_piece(int(i)) for i in world.visual.quantizer.words(0).unique()}
    assert names & {"▁red", "▁green", "▁blue", "▁white", "▁black", "▁gray"}


def test_pieces_in_nearly_every_text_name_nothing() -> None:
    assert usable_rows([[1, 2], [1, 3], [1, 3, 4]] * 5, size=6).tolist() == [2, 3, 4]


def test_a_teacher_survives_its_file(tmp_path: Path) -> None:
    teacher = small_world().teacher
    teacher.save(tmp_path / "t.safetensors")
    assert torch.equal(Teacher.load(tmp_path / "t.safetensors").image_embedding(pictures()), teacher.image_embedding(pictures()))
    with pytest.raises(FileNotFoundError, match="there is no teacher"):
        Teacher.load(tmp_path / "none")


def test_training_twice_gives_the_same_teacher() -> None:
    x = (pictures(40).add(1).mul(127.5)).byte().movedim(1, -1).numpy()
    short = dataclasses.replace(RECIPE, teacher=dataclasses.replace(RECIPE.teacher, steps=2))
    runs = [train_teacher(x, ["a red star", "a blue ring"] * 20, small_world().text, short).state_dict() for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_picture_of_another_size_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"48.*takes 32x32.*data.images.fit"):
        small_world().visual.encode(torch.zeros(1, 3, 48, 48))


def test_a_folder_that_misses_a_file_is_named(tmp_path: Path) -> None:
    shutil.copytree(small_world().visual_folder, tmp_path / "v")
    (tmp_path / "v" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        VisualTokenizer.load(tmp_path / "v")


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="patches of 7"):
        TokenizerConfig(tower=TowerConfig(image_size=32, patch_size=7))
    with pytest.raises(ValueError, match=r"pixel_dims"):
        TokenizerConfig(tower=TowerConfig(image_size=32, patch_size=4))
