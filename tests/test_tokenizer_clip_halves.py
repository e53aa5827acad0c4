"""Half an open_clip model, read from a file, gives what the whole one gives."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file

from tokenizer.contrastive import TextTower
from tokenizer.tower_source import parse
from tokenizer.towers import Tower

CONFIG: dict[str, Any] = {
    "embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 1}}
MEAN, STD = torch.tensor((0.4, 0.5, 0.6)), torch.tensor((0.2, 0.3, 0.4))


def whole(kind: str = "CLIP", **vision: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(open_clip, kind)(CONFIG["embed_dim"], {**CONFIG["vision_cfg"], **vision}, CONFIG["text_cfg"])
    for parameter in model.parameters():  # norms and biases too: a wrong place must show
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def folder(path: Path, model: Any, **vision: Any) -> Path:
    path.mkdir(exist_ok=True)
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}
    (path / "open_clip_config.json").write_text(json.dumps({
        "model_cfg": config, "preprocess_cfg": {"mean": MEAN.tolist(), "std": STD.tolist()}}))
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


def pictures(size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x / 2 + 0.5 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_both_halves_agree_with_the_whole_model(tmp_path: Path, kind: str) -> None:
    model, x = whole(kind), pictures()
    pooled, features = Tower.load(f"open_clip:{folder(tmp_path, model)}")(x)
    model.visual.output_tokens = True
    expected = model.visual(normalized(x))
    torch.testing.assert_close((pooled, features), expected)
    text = TextTower.load(f"open_clip:{tmp_path}")
    ids = text.tokenize(["a red star", "two blue rings and more than fit"])
    assert ids.shape == (2, 8) and text.width == 16
    torch.testing.assert_close(text(ids), model.encode_text(ids))
    assert all(p.requires_grad for p in text.parameters())


def test_a_hidden_layer_is_the_output_of_its_block(tmp_path: Path) -> None:
    model, x = whole(), pictures()
    _, features = Tower.load(f"open_clip:{folder(tmp_path, model)}", layer=-2)(x)
    expected = model.visual.forward_intermediates(normalized(x), indices=[1], output_fmt="NLC")["image_intermediates"][0]
    torch.testing.assert_close(features, expected)


def test_another_size_is_the_model_with_resized_positions(tmp_path: Path) -> None:
    model, larger, x = whole(), whole(image_size=48), pictures((48, 48))
    weights = dict(model.state_dict())
    resize_pos_embed(weights, larger)
    larger.load_state_dict(weights)
    torch.testing.assert_close(Tower.load(f"open_clip:{folder(tmp_path, model)}")(x)[0], larger.visual(normalized(x)))


def test_a_tower_of_timm_inside_open_clip_takes_other_sizes_as_timm_does(tmp_path: Path) -> None:
    import timm
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
    model, x = whole("CustomTextCLIP", **vision), pictures((64, 32))
    tower = Tower.load(f"open_clip:{folder(tmp_path, model, **vision)}")
    free: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    free.load_state_dict(model.visual.trunk.state_dict())
    pooled, features = tower(x)
    torch.testing.assert_close(features, free.forward_features(normalized(x))[:, 1:])
    torch.testing.assert_close(pooled, model.visual.head(free(normalized(x))))
    assert pooled.shape[1] == tower.pooled_width == 16


def test_with_attention_pooling_features_are_the_patches_and_not_the_queries(tmp_path: Path) -> None:
    vision: dict[str, Any] = {"attentional_pool": True, "attn_pooler_queries": 7, "attn_pooler_heads": 2, "output_tokens": True}
    pooled, features = Tower.load(f"open_clip:{folder(tmp_path, whole(**vision), **vision)}")(pictures())
    assert pooled.shape == (2, 16) and features.shape == (2, 16, 32)


def test_published_names_know_their_statistics_and_width() -> None:
    tower = Tower.load("open_clip:ViT-S-32-alt:random")
    assert (tower.patch_size, tower.width, tower.pooled_width) == (32, 384, 256)
    assert tower.anatomy.statistics[0] == (0.48145466, 0.4578275, 0.40821073)


def test_weights_whose_statistics_are_unclear_need_a_tag(tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    with pytest.raises(ValueError, match=r"differ in mean and standard deviation: .* ViT-L-14@TAG with one of openai"):
        Tower.load(f"open_clip:ViT-L-14:{tmp_path / 'w.pt'}")


def test_a_tag_says_which_activation_and_statistics() -> None:
    from tokenizer.clip_halves import describe
    config, statistics = describe(parse("open_clip:ViT-L-14@laion2b_s32b_b82k:random"))
    assert statistics[0] == (0.5, 0.5, 0.5) and not config["quick_gelu"]
    assert describe(parse("open_clip:ViT-L-14@openai:random"))[0]["quick_gelu"]


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", whole())
    torch.save({"state_dict": {f"module.{k}": v for k, v in whole(layers=2).state_dict().items()}}, tmp_path / "short.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    for text, error, words in (
            (f"open_clip:{path}:{tmp_path / 'short.pt'}", ValueError, "12 missing, such as transformer.resblocks.2"),
            (f"open_clip:{path}:{tmp_path / 'broken.pt'}", ValueError, "broken.pt is no state dict"),
            (f"open_clip:{path}:{tmp_path / 'none.pt'}", FileNotFoundError, "none.pt of tower .* do not exist"),
            ("open_clip:ViT-B-17:random", ValueError, "knows no model ViT-B-17: it has ViT-B-16"),
            ("open_clip:ViT-B-16@mine:random", ValueError, "no weights called mine"),
            ("open_clip:RN50:random", ValueError, "no vision transformer"),
            ("open_clip:ViT-B-16", ValueError, "does not say where the weights are"),
            (f"open_clip:{tmp_path}:random", FileNotFoundError, "no open_clip_config.json")):
        with pytest.raises(error, match=words) as raised:
            Tower.load(text)
        assert "\n" not in str(raised.value)


def test_text_towers_that_would_be_downloaded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="roberta-base, which open_clip would download"):
        TextTower.load("open_clip:roberta-ViT-B-32:random")
    path = folder(tmp_path, whole("CustomTextCLIP"))
    config = json.loads((path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    (path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="put its files beside the weights"):
        TextTower.load(f"open_clip:{path}")
    with pytest.raises(ValueError, match="is no text tower"):
        TextTower.load("timm:vit_tiny_patch16_224:random")
