"""A run that is killed, stopped, moved or fed nonsense ends where it should."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import everything, whole_checkpoints
from safetensors.torch import save_file
from tiny_model import token_shards
from toy_rows import TINY, VOCAB, ToyRows, tiny, train

from data.config import DataConfig
from data.loader import Loader, Row
from mmllm.config import Parallel, Pretrain, recipe_fields
from mmllm.launch import launch
from mmllm.megatron import parallel
from mmllm.megatron.metrics import position
from mmllm.megatron.model import build
from mmllm.megatron.optim import lr_scale
from mmllm.megatron.resume import changes
from mmllm.megatron.train import fit
from mmllm.megatron.train import train as train_on_data
from mmllm.run import read_metrics


@dataclass(frozen=True)
class StoppingRows(ToyRows):
    """Asks the run to stop while it reads the third step."""

    def row(self, number: int) -> Row:
        if number == 9:
            signal.raise_signal(signal.SIGTERM)
        return super().row(number)


def test_told_to_stop_it_saves_and_continues_the_same(tmp_path: Path) -> None:
    whole, cut = (tiny(tmp_path / name, steps=5) for name in ("whole", "cut"))
    train(whole)
    fit(cut, StoppingRows())
    assert whole_checkpoints(cut) == ["step_0000003"]
    train(cut)
    ours, expected = (everything(recipe.out / "checkpoints" / "step_0000005") for recipe in (cut, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_bf16_keeps_fp32_weights_beside(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, steps=6, precision="bf16")
    train(replace(recipe, steps=3))
    train(recipe)                                                               # continues
    tensors = everything(recipe.out / "checkpoints" / "step_0000006")
    weights, masters = (tensors[prefix + "output_layer.weight"] for prefix in ("", "optimizer.state.param."))
    assert (weights.dtype, masters.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(masters.bfloat16(), weights)
    assert not torch.equal(masters, weights.float())
    assert read_metrics(recipe.out)[-1]["loss"] < read_metrics(recipe.out)[0]["loss"] - 0.1


@pytest.fixture
def finished(tmp_path: Path) -> Pretrain:
    """Four steps, saved after each second one, on one rank of this process."""
    recipe = tiny(tmp_path / "run", steps=4, save_every=2)
    train(recipe)
    return recipe


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, steps=5, save_every=1, keep_last=2)
    train(recipe)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000004", "step_0000005"]


def remove_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("*.distcp")).unlink()


def change_a_byte(checkpoint: Path) -> None:
    victim = next(checkpoint.glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def cut_its_list(checkpoint: Path) -> None:
    content = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(content[:len(content) // 2])


@pytest.mark.parametrize("harm", [remove_a_file, change_a_byte, cut_its_list])
def test_a_broken_newest_checkpoint_is_set_aside_and_the_one_before_taken(
        finished: Pretrain, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished.out / "checkpoints"
    expected = everything(folder / "step_0000004")
    harm(folder / "step_0000004")
    train(replace(finished, save_every=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if "set aside" in line]
    assert len(lines) == 1 and "step_0000004.broken, the one before is taken" in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == ["step_0000002", "step_0000004", "step_0000004.broken"]
    ours = everything(folder / "step_0000004")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_where_all_checkpoints_are_broken_the_run_does_not_begin_anew(finished: Pretrain) -> None:
    for checkpoint in (finished.out / "checkpoints").iterdir():
        remove_a_file(checkpoint)
    with pytest.raises(ValueError, match=r"no checkpoint left .*step_0000004 is missing .*step_0000002 is missing"):
        train(finished)


def test_a_half_written_checkpoint_is_passed_over(finished: Pretrain) -> None:
    folder = finished.out / "checkpoints"
    shutil.copytree(folder / "step_0000004", folder / "step_0000006.tmp")
    train(replace(finished, steps=6, save_every=0))
    assert [record["step"] for record in read_metrics(finished.out)] == [1, 2, 3, 4, 5, 6]


def test_another_recipe_does_not_continue_unless_told_to(finished: Pretrain) -> None:
    other = replace(finished, steps=5, image_loss_weight=2.0)
    with pytest.raises(ValueError, match=r"another recipe: image_loss_weight \(0.5 then, 2.0 now\)"):
        train(other)
    train(replace(other, accept_changes=True))


@dataclass(frozen=True)
class PoisonedRows(ToyRows):
    """The sixth row's first loss weight is not a number."""

    def row(self, number: int) -> Row:
        row = super().row(number)
        return replace(row, loss_weight=np.where(row.loss_weight > 0, np.float32("nan"), 0)) if number == 5 else row


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"step 1, rank 0: .*toy-4, toy-5, toy-6.*saved in"):
        fit(tiny(tmp_path), PoisonedRows())
    saved = torch.load(tmp_path / "bad_step_0000001_rank_0.pt", weights_only=False)
    assert np.isnan(saved["rows"][1]["loss_weight"]).any()


@pytest.fixture
def one_rank() -> Iterator[parallel.Layout]:
    yield parallel.start(Parallel(), 0)
    parallel.stop()


def test_given_rows_start_where_they_belong(tmp_path: Path, one_rank: parallel.Layout) -> None:
    ids = torch.tensor([VOCAB.first_image, VOCAB.size - 1, 2])
    rows, output_rows = torch.randn(3, TINY.hidden_size), torch.randn(3, TINY.hidden_size)
    save_file({"rows": rows, "ids": ids, "output_rows": output_rows}, tmp_path / "rows.safetensors")
    plain, placed = (build(recipe, one_rank, VOCAB.size)[0] for recipe in
                     (tiny(tmp_path), tiny(tmp_path, init_rows=tmp_path / "rows.safetensors")))
    assert torch.equal(placed.embedding.word_embeddings.weight[ids], rows)
    assert torch.equal(placed.output_layer.weight[ids], output_rows)
    others = torch.ones(len(placed.output_layer.weight), dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(placed.output_layer.weight[others], plain.output_layer.weight[others])


def test_rows_of_another_width_are_refused(tmp_path: Path, one_rank: parallel.Layout) -> None:
    save_file({"rows": torch.randn(3, 8)}, tmp_path / "rows.safetensors")
    with pytest.raises(ValueError, match=r"rows \[3, 8\] .* the model wants \[3, 32\]"):
        build(tiny(tmp_path, init_rows=tmp_path / "rows.safetensors"), one_rank, VOCAB.size)


def test_the_rate_warms_up_holds_and_falls_to_its_floor() -> None:
    optim = replace(tiny(Path("x")).optim, warmup_steps=10, hold_ratio=0.3, min_lr_ratio=0.1)
    scales = [lr_scale(step, 100, optim) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:40] == [1.0] * 31
    assert scales[70] == pytest.approx(0.55)
    assert scales[99] == pytest.approx(0.1, abs=1e-3)
    assert scales == sorted(scales[:10]) + sorted(scales[10:], reverse=True)


def test_tensorboard_and_recipe_are_written(tmp_path: Path) -> None:
    train(tiny(tmp_path, steps=1, tensorboard=True))
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "recipe.json").read_text())["model"]["hidden_size"] == TINY.hidden_size


def on_shards(folder: Path, out: Path) -> Pretrain:
    """Two steps on real token shards of 60 documents."""
    return tiny(out, steps=2, data=DataConfig(shards=token_shards(folder / "tokens"), row_len=256))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    recipe = on_shards(tmp_path, tmp_path / "run")
    (tmp_path / "tokens/train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"token shard .*train-000000\.tar is missing"):
        train_on_data(recipe)


def vanish(recipe: Pretrain) -> None:
    """What a rank runs whose shard goes away once it has been found."""
    loader = Loader(recipe.data)
    Path(recipe.data.shards, "train-000000.tar").unlink()
    fit(recipe, loader)


def test_a_shard_that_vanishes_ends_the_run_in_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(ValueError, match=r"token shard .*train-000000\.tar is missing") as caught:
        launch("test_mmllm_pretrain:vanish", on_shards(tmp_path, tmp_path / "run"), 1)
    assert "\n" not in str(caught.value) and "Traceback" not in capfd.readouterr().err


def test_a_checkpoint_of_another_model_is_refused_field_by_field(finished: Pretrain) -> None:
    other = replace(finished, model=replace(TINY, hidden_size=48), optim=replace(finished.optim, lr=1.0))
    with pytest.raises(ValueError, match=r"another recipe: model\.hidden_size \(32 then, 48 now\); optim\.lr \(0\.003 then, 1\.0 now\)\."):
        train(other)


def test_a_checkpoint_of_a_program_that_knew_fewer_fields_is_continued(finished: Pretrain) -> None:
    """A field that was added since counts as what it is by default."""
    assert changes(recipe_fields(finished), finished) == []
    then = recipe_fields(finished)
    del then["optim"]["schedule"], then["batch_ramp"], then["fp8"]
    assert changes(then, finished) == []
    assert changes(then, replace(finished, optim=replace(finished.optim, schedule="wsd"))) != []


def test_the_log_tells_where_in_the_data_the_run_is(tmp_path: Path) -> None:
    loader = Loader(on_shards(tmp_path, tmp_path / "run").data)
    name, = loader.plan.names
    for rows in (1, 7, 40):
        documents = sum(len(loader.row(number).keys) for number in range(rows))
        assert position(loader, rows) == {"rows": rows, f"epoch/{name}": documents / 60}
