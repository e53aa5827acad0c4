"""A tower gives what its library gives: same features, same pooled vector, at any size, without the tokens that are no patches."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from tokenizer.tower_source import parse
from tokenizer.towers import HF, Tower

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
                         "patch_size": 8}
TEXT = {**{k: v for k, v in SIZES.items() if k not in ("image_size", "patch_size")}, "vocab_size": 40, "max_position_embeddings": 8,
        "bos_token_id": 1, "eos_token_id": 2}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def built(kind: str) -> Any:
    """The whole model as it is published: with its text tower where it has one."""
    t = transformers
    if kind in ("siglip", "siglip2"):
        name, vision = ("Siglip", SIZES) if kind == "siglip" else ("Siglip2", {**SIZES, "num_patches": 16})
        return getattr(t, f"{name}Model")(getattr(t, f"{name}Config")(vision_config=vision, text_config=TEXT))
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(vision_config={**SIZES, "projection_dim": 24}, text_config=TEXT, projection_dim=24))
    config = {"dinov2": "Dinov2Config", "dinov2_with_registers": "Dinov2WithRegistersConfig", "dinov3_vit": "DINOv3ViTConfig"}[kind]
    return getattr(t, HF[kind][0])(getattr(t, config)(**SIZES, **({} if kind == "dinov2" else {"num_register_tokens": 3})))


def saved(path: Path, kind: str) -> tuple[Path, Any]:
    torch.manual_seed(0)
    model = built(kind).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return path, model


def pictures(size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def normalized(x: torch.Tensor, mean: Any = MEAN, std: Any = STD) -> torch.Tensor:
    return (x / 2 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def by_library(kind: str, model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hugging Face's own answer for normalized pictures: pooled, patch features under the final norm, the last but one's."""
    vision = getattr(model, "vision_model", model)
    if kind == "siglip2":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches
        patches = torch.stack([convert_image_to_patches(each, 8) for each in x])
        grid = torch.tensor([[x.shape[2] // 8, x.shape[3] // 8]] * len(x))
        out = vision(patches, pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long), spatial_shapes=grid,
                     output_hidden_states=True)
    else:
        out = vision(x, output_hidden_states=True, **({} if kind.startswith("dino") else {"interpolate_pos_encoding": True}))
    pooled, last = out.pooler_output, out.last_hidden_state
    if kind == "clip":  # which norms its class token only
        pooled, last = model.visual_projection(pooled), vision.post_layernorm(last)
    skip = {"siglip": 0, "siglip2": 0, "clip": 1, "dinov2": 1}.get(kind, 4)
    return pooled, last[:, skip:], out.hidden_states[-2][:, skip:]


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
@pytest.mark.parametrize("kind", list(HF))
def test_a_hugging_face_tower_agrees_with_its_library(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    folder, model = saved(tmp_path, kind)
    tower, inner, x = Tower.load(f"hf:{folder}"), Tower.load(f"hf:{folder}", layer=-2), pictures(size)
    pooled, last, before = by_library(kind, model, normalized(x))
    torch.testing.assert_close(tower(x), (pooled, last))
    torch.testing.assert_close(inner(x)[1], before)
    assert last.shape[2] == tower.width and pooled.shape[1] == tower.pooled_width and tower.patch_size == 8


def test_a_vision_model_saved_alone_is_read_too(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "whole", "clip")
    model.vision_model.save_pretrained(tmp_path / "alone")
    x = pictures()
    alone = Tower.load(f"hf:{tmp_path / 'alone'}")  # without preprocessor_config.json CLIP's statistics hold
    assert alone.pooled_width == 32 and alone.anatomy.statistics[0] == (0.48145466, 0.4578275, 0.40821073)
    undo = (normalized(x) * torch.tensor(alone.anatomy.statistics[1]).view(3, 1, 1)
            + torch.tensor(alone.anatomy.statistics[0]).view(3, 1, 1) - 0.5) * 2
    torch.testing.assert_close(alone(undo)[1], Tower.load(f"hf:{folder}")(x)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", (32, 64)), ("eva02_tiny_patch14_224", (28, 56))])
def test_a_timm_tower_agrees_with_its_library(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, dynamic_img_size=True).eval()  # published with a head, which is of no use
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    x, mean, std = pictures(size), model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    last = model.forward_features(normalized(x, mean, std))
    before = model.forward_intermediates(normalized(x, mean, std), indices=[-2], norm=False, output_fmt="NLC", intermediates_only=True)[0]
    tower = Tower.load(f"timm:{name}:{tmp_path / 'w.safetensors'}")
    torch.testing.assert_close(tower(x), (model.forward_head(last, pre_logits=True), last[:, model.num_prefix_tokens:]))
    torch.testing.assert_close(Tower.load(f"timm:{name}:{tmp_path / 'w.pth'}", layer=-2)(x)[1], before)


def test_a_loaded_tower_is_frozen_and_a_copy_of_it_its_own() -> None:
    tower = Tower.load("timm:vit_tiny_patch16_224:random")
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    twin, x = copy.deepcopy(tower), pictures()
    before = tower(x)[1]
    twin.requires_grad_(True)(x)[1].sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(tower(x)[1], before) and not torch.equal(twin(x)[1], before)


def test_a_random_tower_takes_the_state_of_a_loaded_one(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "dinov2")
    tower, blank, x = Tower.load(f"hf:{folder}"), Tower.load(f"hf:{folder}:random"), pictures()
    assert not torch.equal(blank(x)[0], tower(x)[0])
    blank.load_state_dict(tower.state_dict())
    assert torch.equal(blank(x)[0], tower(x)[0])


def test_a_teacher_of_another_width_is_refused_before_training() -> None:
    tower = Tower.load("timm:vit_tiny_patch16_224:random")
    tower.expect(192, "semantic_width")
    with pytest.raises(ValueError, match="features of 192 dims, semantic_width says 128: set semantic_width to 192 or name another tower"):
        tower.expect(128, "semantic_width")


def test_pictures_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="40x32 px do not divide into the 16 px patches of tower timm:vit_tiny_patch16_224"):
        Tower.load("timm:vit_tiny_patch16_224:random")(pictures((40, 32)))


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a", "siglip")
    weights = load_file(folder / "model.safetensors")
    part, broken, empty = (tmp_path / name for name in ("part", "broken", "empty"))
    for place in (part, broken, empty):
        place.mkdir()
        (place / "config.json").write_text((folder / "config.json").read_text())
    save_file({k: v for k, v in weights.items() if "post_layernorm" not in k}, part / "model.safetensors", {"format": "pt"})
    (broken / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    for text, error, words in (
            (f"hf:{part}", ValueError, "lacks 2 tensors of SiglipVisionModel, such as post_layernorm.bias"),
            (f"hf:{broken}", ValueError, "cannot be read as SiglipVisionModel"),
            (f"hf:{empty}", FileNotFoundError, "holds no weights"),
            (f"hf:{tmp_path / 'bert'}", ValueError, "of type bert: a tower is one of siglip"),
            (f"hf:{tmp_path}", FileNotFoundError, "has no config.json"),
            (f"timm:vit_tiny_patch16_224:{tmp_path / 'w.safetensors'}", ValueError, "150 missing, such as cls_token; 1 unknown, such as a"),
            (f"timm:vit_tiny_patch16_224:{tmp_path / 'none.pth'}", FileNotFoundError, "nothing is downloaded"),
            ("timm:vit_tiny_patch16_225:random", ValueError, "knows no model .* vit_tiny_patch16_224"),
            ("timm:resnet18:random", ValueError, "name a vision transformer"),
            ("clip:ViT-B-16:random", ValueError, "names no tower: write open_clip:NAME:WEIGHTS")):
        with pytest.raises(error, match=words) as raised:
            Tower.load(text)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="has 12 blocks and no layer 12: give one from -12 to 11"):
        Tower.load("timm:vit_tiny_patch16_224:random", layer=12)


def test_a_source_is_its_parts(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "w.pt").touch()
    source = parse(f"open_clip:ViT-B-16@openai:{tmp_path / 'w.pt'}")
    assert (source.library, source.name, source.weights) == ("open_clip", "ViT-B-16@openai", tmp_path / "w.pt")
    assert parse(f"hf:{tmp_path}").weights == tmp_path and parse(f"hf:{tmp_path}:random").weights is None
