"""Scores are the cosines of the model itself, whatever is batched with what, and thresholds cut where they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data import shards
from data.curate import scores
from data.curate.clip import Aesthetic
from data.curate.filter import Limit, Rules, filter_shards
from data.curate.scores import Scoring, described
from data.document import Document
from data.images import fitted, to_array, to_png

CONFIG: dict[str, Any] = {
    "embed_dim": 12, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49_408, "width": 8, "heads": 2, "layers": 1}}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
PNG = [to_png(np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), np.uint8)) for i in range(6)]
DOCUMENTS = [
    Document("pair", (PNG[0], "a red star"), captions=("two blue rings",)),
    Document("several", ("first words", PNG[1], PNG[2], "behind", "farther", PNG[3])),
    Document("silent", (PNG[4],)),
    Document("text", ("only words",)),
    Document("bad", (b"none", "words", PNG[5])),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    whole = open_clip.CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"]).eval()
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": MEAN, "std": STD}}))
    save_file(whole.state_dict(), folder / "open_clip_model.safetensors")
    return whole, folder


def head(path: Path, width: int = 12) -> Path:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(a, b) if a else torch.nn.Dropout() for a, b in (
        (width, 9), (0, 0), (9, 7), (0, 0), (7, 5), (0, 0), (5, 3), (3, 1))))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)
    return path


def embedded(whole: Any, file: bytes) -> torch.Tensor:
    pixels = torch.from_numpy(to_array(fitted(file, 16)).copy()).permute(2, 0, 1)[None] / 255
    return whole.encode_image((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), normalize=True)[0]


def cosine(whole: Any, file: bytes, *texts: str) -> float:
    ids = open_clip.SimpleTokenizer(context_length=8)(list(texts))
    return (whole.encode_text(ids, normalize=True) @ embedded(whole, file)).max().item()


@torch.no_grad()
def test_scores_are_those_of_the_model_itself(tmp_path: Path, model: tuple[Any, Path]) -> None:
    whole, folder = model
    source = shards.write(DOCUMENTS, tmp_path / "raw", "train", 3)
    how = Scoring(clip=f"open_clip:{folder}", aesthetic=head(tmp_path / "head.pth"), batch_len=2)
    scores.score(source, tmp_path / "scores", how)
    found = {scored.key: scored for path in source for scored in scores.read(scores.scores_path(tmp_path / "scores", path))}
    assert list(found) == [document.key for document in DOCUMENTS]
    assert found["pair"].clip == pytest.approx([cosine(whole, PNG[0], "a red star", "two blue rings")], abs=1e-5)
    near = [("first words", "behind"), ("first words", "behind"), ("farther",)]
    assert found["several"].clip == pytest.approx([cosine(whole, PNG[i + 1], *near[i]) for i in range(3)], abs=1e-5)
    assert list(found["silent"].clip) == [None] and not found["text"].clip and found["bad"].clip[0] is None
    assert found["bad"].refused[0] and found["bad"].refused[0].startswith("does not decode") and found["bad"].refused[1] is None
    layers = torch.load(tmp_path / "head.pth", weights_only=True)
    x = embedded(whole, PNG[4])
    for n in (0, 2, 4, 6, 7):
        x = F.linear(x, layers[f"layers.{n}.weight"], layers[f"layers.{n}.bias"])
    assert found["silent"].aesthetic == pytest.approx([x.item()], abs=1e-5)
    scores.score(source, tmp_path / "other", Scoring(clip=how.clip, aesthetic=how.aesthetic, batch_len=64), processes=1)
    for other in (other for path in source for other in scores.read(scores.scores_path(tmp_path / "other", path))):
        scored = found[other.key]
        assert other.clip == pytest.approx(scored.clip, abs=1e-5) and other.aesthetic == pytest.approx(scored.aesthetic, abs=1e-5)
        assert other.refused == scored.refused
    assert any(line.startswith("clip: 5 pictures") for line in scores.summary(tmp_path / "scores", source))


def test_a_picture_is_described_by_what_is_near_it() -> None:
    assert [texts for _, texts in described(DOCUMENTS[1])] == [["first words", "behind"], ["first words", "behind"], ["farther"]]
    assert described(DOCUMENTS[0]) == [(PNG[0], ["a red star", "two blue rings"])]


def write_scores(folder: Path, source: list[Path], numbers: dict[str, list[float | None]]) -> None:
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    for path in source:
        lines = [json.dumps({"key": d.key, "clip": numbers[d.key]}) for d in shards.read(path) if d.key in numbers]
        scores.scores_path(folder, path).write_text("\n".join(lines) + "\n")


def test_thresholds_and_top_shares_cut_where_they_say(tmp_path: Path) -> None:
    source = shards.write(DOCUMENTS[:4], tmp_path / "raw", "train", 2)
    numbers: dict[str, list[float | None]] = {"pair": [0.3], "several": [0.1, 0.4, 0.2], "silent": [None], "text": []}
    write_scores(tmp_path / "scores", source, numbers)

    def keys(name: str, rules: Rules) -> dict[str, int]:
        filter_shards(source, tmp_path / name, rules)
        return {d.key: len(d.parts) for d in shards.read_all(shards.find(tmp_path / name))}

    at = tmp_path / "scores"
    assert keys("a", Rules(scores=at, clip=Limit(least=0.3))) == {"pair": 2, "silent": 1, "text": 1}
    assert keys("b", Rules(scores=at, clip=Limit(least=0.15), on_loss="part")) == {"pair": 2, "several": 5, "silent": 1, "text": 1}
    assert keys("c", Rules(scores=at, clip=Limit(top=0.25), on_loss="part")) == {"several": 4, "silent": 1, "text": 1}
    assert json.loads((tmp_path / "c" / "curation.json").read_text())["settings"]["least"] == {"clip": 0.4}
    assert keys("d", Rules(scores=at)) == {"pair": 2, "several": 6, "silent": 1, "text": 1}


def test_scores_of_other_shards_are_no_reason_to_drop_anything(tmp_path: Path) -> None:
    source = shards.write(DOCUMENTS[:4], tmp_path / "raw", "train")
    write_scores(tmp_path / "scores", source, {"pair": [0.3]})
    with pytest.raises(FileNotFoundError, match=r"no scores of train-000000\.tar/several: score the shards"):
        filter_shards(source, tmp_path / "out", Rules(scores=tmp_path / "scores", clip=Limit(least=0.3)))
    with pytest.raises(ValueError, match="no picture has a score of aesthetic"):
        filter_shards(source, tmp_path / "out2", Rules(scores=tmp_path / "scores", aesthetic=Limit(top=0.5)))


def test_a_head_is_a_plain_linear_layer_or_laions_five_and_nothing_else(tmp_path: Path) -> None:
    linear = torch.nn.Linear(12, 1)
    save_file(linear.state_dict(), tmp_path / "linear.safetensors")
    x = torch.randn(4, 12)
    torch.testing.assert_close(Aesthetic.load(tmp_path / "linear.safetensors")(x), linear(x)[:, 0])
    torch.save({f"layers.{n}.{kind}": torch.zeros(1) for n in (0, 3) for kind in ("weight", "bias")}, tmp_path / "relu.pth")
    with pytest.raises(ValueError, match="is no aesthetic head"):
        Aesthetic.load(tmp_path / "relu.pth")


def test_a_head_for_another_width_is_refused_before_work_begins(tmp_path: Path, model: tuple[Any, Path]) -> None:
    source = shards.write(DOCUMENTS, tmp_path / "raw", "train")
    how = Scoring(clip=f"open_clip:{model[1]}", aesthetic=head(tmp_path / "head.pth", 13))
    with pytest.raises(ValueError, match="reads embeddings of 13 dims"):
        scores.score(source, tmp_path / "scores", how)
