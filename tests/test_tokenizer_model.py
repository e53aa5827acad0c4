"""The visual tokenizer encodes, decodes, trains and survives its folder."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_world import RECIPE, small_world

from data import shards
from data.images import to_tensor
from data.pairs import Pairs
from data.scenes.image import render
from data.scenes.world import World
from mmllm.runs.train_teacher import TeacherTraining, train_teacher
from mmllm.runs.train_tokenizer import usable_rows
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.objective import Objective, Weights
from tokenizer.quantize import QuantizerConfig, SharedIndexQuantizer
from tokenizer.semantic import Teacher, TowerConfig


def pictures(count: int = 6) -> torch.Tensor:
    world = World.at_level(1)
    return torch.stack([to_tensor(render(world.scene(5, i))) for i in range(count)])


def words_of(visual: VisualTokenizer) -> torch.Tensor:
    assert isinstance(visual.quantizer, SharedIndexQuantizer)
    words = visual.quantizer.words(0)
    assert words is not None
    return words


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
        visual.pixel.decoder.semantic.weight[0, 0] += 1e-3  # pyright: ignore
    visual.save(tmp_path / "v")
    assert visual.fingerprint != small_world().visual.fingerprint


def test_every_trained_part_gets_a_gradient_and_the_tower_none() -> None:
    visual = VisualTokenizer.load(small_world().visual_folder).train()
    for name, parameter in visual.named_parameters():
        parameter.requires_grad_(not name.startswith("semantic_tower"))
    quantizer = visual.quantizer
    assert isinstance(quantizer, SharedIndexQuantizer)
    for table in quantizer.semantic_tables:  # loaded to encode: rows are frozen until there is a text embedding again
        table.text = torch.randn(len(table.ids), len(table.projection))
    losses, _ = Objective(visual)(pictures(), Weights())
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in visual.named_parameters():
        assert (parameter.grad is None) == name.startswith("semantic_tower"), name


def test_codes_are_named_by_words_of_the_captions() -> None:
    world = small_world()
    names = {world.text.processor.id_to_piece(int(i)) for i in words_of(world.visual).unique()}
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
    world = small_world()
    pairs = Pairs(shards.find(world.raw, "train-"), 32)
    runs = [train_teacher(pairs, world.text, RECIPE.model.tower, TeacherTraining(steps=2)).state_dict() for _ in range(2)]
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


SHARED = QuantizerConfig(codebook_size=32, semantic_dim=4, pixel_dims=(4, 4), semantic_weights=(1.0,), pixel_norm=True,
                         semantic_table="free")
SMALL = TowerConfig(width=32, layers=1, heads=2, embed_dim=16)
KINDS = {
    "conv": TokenizerConfig(tower=SMALL, pixel="conv", channels=8, multipliers=(1, 1, 2, 2), scales=(1, 2), quantizer=SHARED),
    "vit": TokenizerConfig(tower=SMALL, pixel="vit", width=32, layers=1, heads=2, semantic_layers=1, quantizer=SHARED, max_aspect=2.0),
    "linear": TokenizerConfig(tower=SMALL, pixel="linear", quantizer=replace(SHARED, pixel_norm=False)),
    "bsq": TokenizerConfig(tower=SMALL, pixel="vit", width=32, layers=1, heads=2, quantizer=QuantizerConfig(kind="bsq", bits=(8,))),
    "fsq": TokenizerConfig(tower=SMALL, pixel="vit", width=32, layers=1, heads=2, quantizer=QuantizerConfig(kind="fsq")),
    "residual": TokenizerConfig(tower=SMALL, pixel="conv", channels=8, multipliers=(1, 1, 2, 2),
                                quantizer=QuantizerConfig(kind="residual")),
    "timm": TokenizerConfig(tower_source="timm:vit_tiny_patch16_224:random", pixel="vit", width=32, layers=1, heads=2, quantizer=SHARED),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_has_the_shapes_it_says_at_every_size_and_scale_and_survives_its_folder(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    visual = VisualTokenizer(KINDS[kind]).eval()
    visual.save(tmp_path)
    loaded = VisualTokenizer.load(tmp_path)
    for height, width in visual.sizes:
        x = torch.rand(2, 3, height, width) * 2 - 1
        for scale in visual.scales:
            codes = visual.encode(x, scale)
            assert codes.shape[1] == visual.num_books and (codes.shape[2], codes.shape[3]) in visual.grids
            assert codes.min() >= 0 and codes.max() < visual.codebook_size
            assert visual.decode(codes, scale).shape == x.shape
            assert torch.equal(loaded.encode(x, scale), codes)
            assert torch.allclose(visual(x, scale).images, visual.decode(codes, scale), atol=1e-5)


def test_codes_of_a_bucket_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    visual = VisualTokenizer(KINDS["vit"]).eval()
    x = torch.rand(3, 3, *visual.sizes[0])
    assert len(visual.sizes) > 1 and torch.equal(visual.encode(x), torch.cat([visual.encode(one[None]) for one in x]))


def test_a_perturbed_reading_differs_in_pixels_alone() -> None:
    visual, x = small_world().visual, pictures()
    plain, other = visual(x), visual(x, perturb=lambda codes: (codes + 1) % visual.codebook_size)
    assert torch.equal(plain.codes, other.codes) and torch.equal(plain.semantic, other.semantic)
    assert not torch.equal(plain.images, other.images)
    assert torch.allclose(other.images, visual.decode((plain.codes + 1) % visual.codebook_size), atol=1e-5)


def test_scales_that_do_not_divide_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scales are \(1, 3\).*4 x 4"):
        replace(KINDS["conv"], scales=(1, 3))
    with pytest.raises(ValueError, match="palette patches have a closed form"):
        TokenizerConfig(scales=(1, 2))
