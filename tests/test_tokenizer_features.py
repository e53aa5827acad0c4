"""What judges pictures gives the features of the library it is from, and refuses a wrong file before anything is computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tokenizer import features

PICTURES = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLIP: dict[str, Any] = {
    "embed_dim": 12, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": statistics}))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_inception_features_are_torch_fidelitys(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            """Keeps its random weights."""

    torch.save({}, tmp_path / "none.pth")
    network = Unfilled("random", ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    judge = features.inception(tmp_path / "inception.pth")
    found = judge.embed(PICTURES)
    assert found.shape == (2, 2048) and torch.equal(found, network(PICTURES)[0])
    assert (judge.distance, judge.perturbed, len(judge.weights)) == ("rfid", "pfid", 16)


def test_a_clip_tower_embeds_pictures_and_class_names_as_open_clip_does(clip_folder: Path) -> None:
    import open_clip

    model = open_clip.CLIP(**CLIP)
    model.load_state_dict(torch.load(clip_folder / "open_clip_pytorch_model.bin"))
    model.eval()
    judge = features.clip(str(clip_folder), clip_folder)
    assert judge.distance == f"fid_clip:{clip_folder.name}" and judge.embed_classes is not None
    x = F.interpolate(PICTURES.float() / 255, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    words = open_clip.tokenizer.SimpleTokenizer(context_length=16)(["a photo of a red star.", "a photo of a cat."])
    with torch.no_grad():
        assert torch.allclose(judge.embed(PICTURES), model.encode_image((x - mean) / std), atol=1e-6)
        assert torch.allclose(judge.embed_classes(["red star", "cat"]), model.encode_text(words), atol=1e-6)


def test_the_tokenizers_own_tower_is_pooled_over_patches_and_never_called_fid() -> None:
    judge = features.teacher(lambda x: F.avg_pool2d(x, 8).movedim(1, -1).reshape(-1, 3))
    assert torch.allclose(judge.embed(PICTURES), (PICTURES.float() / 127.5 - 1).mean((-2, -1)), atol=1e-6)
    assert judge.distance == "fd_teacher" and judge.perturbed == "pfd_teacher"


def test_a_missing_file_is_named_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*none\.pth: give --inception"):
        features.inception(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights of ViT-B-16 at .*none\.pt: give --clip-weights"):
        features.clip("ViT-B-16", tmp_path / "none.pt")


def test_a_file_of_other_weights_is_one_line(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no weights of the FID Inception network") as error:
        features.inception(tmp_path / "other.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"other\.pth does not hold the weights of open_clip:ViT-B-16"):
        features.clip("ViT-B-16@openai", tmp_path / "other.pth")
