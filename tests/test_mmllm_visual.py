"""A tokenizer is measured on shards and on photographs, the same whatever the batch, and the page stands alone."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from small_world import RECIPE, small_world

from data.images import fitted, to_array, to_tensor, to_uint8
from data.pictures import pictures
from mmllm.evaluate.measure import tokenizer_scores
from mmllm.evaluate.settings import VisualEvaluation
from mmllm.evaluate.visual import evaluate_visual
from mmllm.evaluate.visual_tally import Sample, Tally
from mmllm.runs.tokenizer_recipe import TrainVisual
from mmllm.runs.train_tokenizer import train
from tokenizer.contrastive import TextTower
from tokenizer.features import teacher
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.objective import CodeContrast, Weights
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import TowerConfig

BACKGROUND = "meta.scene.background"


@cache
def measured() -> tuple[dict[str, Any], Path]:
    out, world = Path(mkdtemp(prefix="mmllm-eval-")), small_world()
    return evaluate_visual(world.visual_folder, world.raw, out, VisualEvaluation(label=BACKGROUND)), out


def test_shards_are_measured_by_the_definitions_that_the_report_uses() -> None:
    record, visual = measured()[0], small_world().visual
    held = np.stack([to_array(fitted(p.file, 32)) for p in pictures(small_world().raw)])
    short, back = tokenizer_scores(visual, held)
    scores = record["scores"]
    assert {name: scores[name] for name in short} == short and record["source"]["pictures"] == len(held) == 16
    assert short["psnr"] == pytest.approx(10 * np.log10(255**2 / np.square(held.astype(float) - back).mean()))
    codes = visual.encode(to_tensor(held))
    again = visual.encode(to_tensor(to_uint8(visual.decode(codes))))
    assert scores["reencode_books"] == pytest.approx((codes == again).double().mean((0, 2, 3)).tolist())


def test_what_was_not_measured_says_why() -> None:
    record = measured()[0]
    missing, scores = record["not_measured"], record["scores"]
    assert {"rfid", "pfid", "fid_clip", "pfid_clip", "lpips", "ms_ssim", "zero_shot"} <= set(missing) and not set(missing) & set(scores)
    assert missing["rfid"] == "no weights given (--inception)" and "32 px" in missing["ms_ssim"]
    assert {"fd_teacher", "pfd_teacher", "linear_probe", "ssim"} <= set(scores) and "biased" in record["notes"][0]


def test_perturbed_codes_move_pictures_further_away_the_more_of_them_there_are() -> None:
    scores = measured()[0]["scores"]
    grid = scores["perturbed"]["pfd_teacher"]
    assert list(grid) == ["α 0.1, δ 10", "α 0.1, δ 63", "α 0.5, δ 10", "α 0.5, δ 63"]  # 100 neighbours of 64 entries are 63
    assert grid["α 0.1, δ 63"] < grid["α 0.5, δ 63"] and scores["pfd_teacher"] == pytest.approx(np.mean([*grid.values()]))


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    world = small_world()
    other = evaluate_visual(world.visual_folder, world.raw, tmp_path, VisualEvaluation(label=BACKGROUND, batch=3))["scores"]
    scores = {name: value for name, value in measured()[0]["scores"].items() if isinstance(value, float)}
    assert scores == {name: pytest.approx(other[name], rel=1e-4, abs=1e-6) for name in scores}
    assert other["legibility"] == measured()[0]["scores"]["legibility"] if "legibility" in other else True


class TwoScales(VisualTokenizer):
    """At scale 2 one code stands for 2 × 2 places: the first of them."""

    @property
    def scales(self) -> tuple[int, ...]:
        return 1, 2

    def encode(self, images: torch.Tensor, scale: int = 1) -> torch.Tensor:
        return super().encode(images)[..., ::scale, ::scale]

    def decode(self, codes: torch.Tensor, scale: int = 1) -> torch.Tensor:
        return super().decode(codes.repeat_interleave(scale, -2).repeat_interleave(scale, -1))


def test_each_scale_has_its_scores_and_its_agreement_with_the_finest() -> None:
    visual = TwoScales.load(small_world().visual_folder)
    tally = Tally(visual=visual, judges=[teacher(visual.features)], perceptual=None, seed=0, device="cpu")
    held = [Sample(p.name, to_array(fitted(p.file, 32)), None) for p in pictures(small_world().raw)]
    for first in range(0, len(held), 5):
        tally.add(held[first:first + 5], visual.quantizer.neighbours(5))
    scores = tally.scores()[0]
    coarse, codes = scores["scales"]["2"], visual.encode(to_tensor(np.stack([sample.picture for sample in held])))
    cells = codes.unflatten(-1, (2, 2)).unflatten(-3, (2, 2))  # [b, M, 2, 2, 2, 2]
    same = (cells == cells[..., :1, :, :1]).double().mean((0, 2, 3, 4, 5))
    assert coarse["as_finest_books"] == pytest.approx(same.tolist()) and coarse["codes_a_picture"] == scores["codes_a_picture"] / 4
    assert coarse["psnr"] < scores["psnr"] == scores["scales"]["1"]["psnr"] and coarse["fd_teacher"] > scores["fd_teacher"]
    assert all(0 <= chance <= 1 for chance in coarse["as_finest_by_chance"])


def test_a_tokenizer_that_pools_by_scale_is_measured_at_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    books = QuantizerConfig(codebook_size=32, semantic_dim=4, pixel_dims=(4,), semantic_table="free")
    tower = TowerConfig(width=32, layers=1, heads=2, embed_dim=16)
    VisualTokenizer(TokenizerConfig(tower=tower, pixel="vit", width=32, layers=1, heads=2, scales=(1, 2), quantizer=books)).save(tmp_path)
    record = evaluate_visual(tmp_path, small_world().raw, tmp_path / "out", VisualEvaluation(limit=4))
    scales = record["scores"]["scales"]
    assert list(scales) == ["1", "2"] and scales["2"]["codes_a_picture"] == scales["1"]["codes_a_picture"] / 4 == 4


def test_the_page_stands_alone_and_shows_what_the_file_says() -> None:
    record, out = measured()
    page = (out / "eval.html").read_text()
    assert json.loads((out / "eval.json").read_text())["scores"] == record["scores"]
    assert page.count("data:image/png;base64,") >= 16 * 3 and not re.search(r"(src|href)=['\"]?(http|/|\.)", page)
    assert f"{record['scores']['psnr']:.2f} dB" in page and "equation 13" in page and "no weights given (--inception)" in page


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Ten photographs of two classes, grey and wide ones among them, and two files that are none."""
    for number in range(10):
        shades = np.random.default_rng(number).integers(0, 256, (5, 7 + number, 3), dtype=np.uint8)
        image = Image.fromarray(shades).resize((90 + 20 * number, 70), Image.Resampling.BICUBIC)
        path = tmp_path / "photographs" / ("cat" if number % 2 else "dog") / f"{number}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if number == 4 else image).save(path)
    (tmp_path / "photographs" / "cat" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "photographs" / "dog" / "half.png").write_bytes((tmp_path / "photographs" / "dog" / "0.png").read_bytes()[:80])
    return tmp_path / "photographs"


def test_photographs_need_no_captions_and_bad_ones_are_named(photographs: Path, tmp_path: Path) -> None:
    record = evaluate_visual(small_world().visual_folder, photographs, tmp_path / "out")
    assert record["source"]["pictures"] == 10 and record["scores"]["classes"] == 2
    assert [one["name"] for one in record["source"]["skipped"]] == ["cat/broken.jpg", "dog/half.png"]
    assert "does not decode" in record["source"]["skipped"][0]["reason"]
    assert set(record["scores"]["linear_probe"]["teacher"]) == {"original", "reconstruction"}


def test_codes_tell_classes_apart_by_the_head_that_training_left(tmp_path: Path) -> None:
    world = small_world()
    world.teacher.save(tmp_path / "teacher.safetensors")
    training = replace(RECIPE, align=replace(RECIPE.align, weights=Weights(contrastive=1.0)))
    train(TrainVisual(raw=world.raw, text=world.text_model, out=tmp_path / "visual", training=training))
    record = evaluate_visual(tmp_path / "visual", world.raw, tmp_path / "out", VisualEvaluation(label=BACKGROUND))
    scores = record["scores"]
    assert {"fd_codes", "pfd_codes"} <= set(scores) and set(scores["linear_probe"]) == {"codes", "teacher"}

    visual, held = VisualTokenizer.load(tmp_path / "visual"), list(pictures(world.raw, label=BACKGROUND))
    text = TextTower.small(visual.config.tower, world.text.size, world.text.encode)
    contrast = CodeContrast(visual.quantizer.part_dims[0], text)
    contrast.load_state_dict(safetensors.torch.load_file(tmp_path / "visual" / "contrast.safetensors"))
    names = sorted({str(one.label) for one in held})
    with torch.no_grad():
        words = text(text.tokenize([f"a photo of a {name}." for name in names]))
        entries = visual(to_tensor(np.stack([to_array(fitted(one.file, 32)) for one in held]))).entries
        near = F.normalize(contrast.embed(visual.quantizer.parts(entries)[0].view(len(held), -1, contrast.dims)), dim=-1)
    right = [names[int(best)] == one.label for best, one in zip((near @ F.normalize(words, dim=-1).T).argmax(-1), held, strict=True)]
    assert len(names) > 1 and scores["zero_shot"]["codes"]["original"] == pytest.approx(np.mean(right))

    (tmp_path / "visual" / "text.model").unlink()
    record = evaluate_visual(tmp_path / "visual", world.raw, tmp_path / "out", VisualEvaluation(label=BACKGROUND))
    assert "fd_codes" not in record["scores"] and "own head: not measured" in record["notes"][-1] and "text.model" in record["notes"][-1]


def test_a_limit_is_spread_over_the_source(photographs: Path, tmp_path: Path) -> None:
    record = evaluate_visual(small_world().visual_folder, photographs, tmp_path / "out", VisualEvaluation(limit=8))
    assert record["source"]["pictures"] + len(record["source"]["skipped"]) == 8 and record["scores"]["classes"] == 2


def test_given_towers_judge_too(photographs: Path, tmp_path: Path) -> None:
    import open_clip
    import torchvision

    config: dict[str, Any] = {
        "embed_dim": 12, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}}
    clip = tmp_path / "small-clip"
    clip.mkdir()
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(open_clip.CLIP(**config).state_dict(), clip / "open_clip_pytorch_model.bin")
    alex = torchvision.models.alexnet().features
    torch.save({f"features.{name}": value for name, value in alex.state_dict().items()}, tmp_path / "alex.pth")
    settings = VisualEvaluation(clip_name=str(clip), clip_weights=clip, lpips=tmp_path / "alex.pth")
    record = evaluate_visual(small_world().visual_folder, photographs, tmp_path / "out", settings)
    scores = record["scores"]
    assert scores["lpips_alex"] > 0 and scores["fid_clip:small-clip"] > 0 and "rfid" not in scores and set(record["weights"]) == {
        "lpips", "clip:small-clip"}
    assert {0 <= value <= 1 for value in scores["zero_shot"]["clip:small-clip"].values()} == {True}
    assert set(scores["linear_probe"]) == {"clip:small-clip", "teacher"}


@pytest.mark.parametrize(("given", "said"), [
    ({"inception": Path("none.pth")}, "there are no Inception weights at none.pth"),
    ({"lpips": Path("none.pth")}, "there are no LPIPS weights at none.pth"),
    ({"clip_name": "ViT-B-16", "clip_weights": Path("none.pt")}, "there are no weights of ViT-B-16 at none.pt"),
    ({"clip_name": "ViT-B-16"}, "give both --clip-name and --clip-weights"),
    ({"font": Path("none.ttf")}, "there is no font none.ttf"),
    ({"limit": 1}, "limit is 1"),
])
def test_missing_weights_are_found_before_the_model_is_looked_for(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        evaluate_visual(Path("nowhere"), Path("nowhere"), tmp_path / "out", VisualEvaluation(**given))
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmllm.cli", "tokenizer", "eval", "nowhere", "nowhere", "--out", str(tmp_path / "out"),
               "--inception", "none.pth"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("mmllm: there are no Inception weights at none.pth: give --inception")
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_folder_where_nothing_decodes_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0 pictures of 2 or more to measure; 1 were refused.*does not decode"):
        evaluate_visual(small_world().visual_folder, tmp_path, tmp_path / "out")
