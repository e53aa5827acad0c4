"""A run that is killed, stopped, moved or fed nonsense ends where it should."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from toy_rows import TINY, VOCAB, ToyRows, tiny, train

from data.loader import Row
from mmllm.config import Parallel, Pretrain
from mmllm.megatron import parallel
from mmllm.megatron.model import build
from mmllm.megatron.optim import lr_scale
from mmllm.megatron.train import fit
from mmllm.run import read_metrics

TESTS = Path(__file__).parent


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizer's too."""
    reader = FileSystemReader(str(checkpoint))
    entries = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()
             if isinstance(entry, TensorStorageMetadata)}
    with warnings.catch_warnings(action="ignore"):                              # it remarks that this is one process
        load(state, storage_reader=reader, no_dist=True)
    return state


def start(recipe: Pretrain) -> subprocess.Popen[bytes]:
    """A command that trains on its own ranks, as a process to send signals to."""
    order = recipe.out.with_suffix(".pickle")
    order.write_bytes(pickle.dumps(recipe))
    code = ("import pickle, sys; from pathlib import Path; from mmllm.launch import launch; "
            "recipe = pickle.loads(Path(sys.argv[1]).read_bytes()); "
            "launch('toy_rows:train', recipe, recipe.parallel.ranks)")
    return subprocess.Popen([sys.executable, "-c", code, str(order)], env={**os.environ, "PYTHONPATH": str(TESTS)})


def wait_for_step(recipe: Pretrain, step: int, process: subprocess.Popen[bytes]) -> None:
    while not any(record["step"] >= step for record in read_metrics(recipe.out)):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.02)


def whole_checkpoints(recipe: Pretrain) -> list[str]:
    return sorted(path.name for path in (recipe.out / "checkpoints").iterdir() if path.suffix == "")


def test_killed_at_any_moment_it_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "whole", steps=24, save_every=4, parallel=Parallel(ranks=2))
    cut = replace(whole, out=tmp_path / "cut")
    assert start(whole).wait() == 0

    process = start(cut)
    wait_for_step(cut, random.randint(5, 18), process)                          # unseeded: any moment must do
    time.sleep(random.random() / 20)
    process.kill()                                                              # its ranks die with it
    process.wait()
    saved = whole_checkpoints(cut)
    assert saved
    assert saved[-1] != "step_0000024"
    time.sleep(0.5)
    assert whole_checkpoints(cut) == saved                                      # nobody trains on

    assert start(cut).wait() == 0

    ours, expected = (everything(recipe.out / "checkpoints" / "step_0000024") for recipe in (cut, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    same = ("step", "loss", "loss/text", "loss/image", "grad_norm", "lr")
    curves = [[[record[name] for name in same] for record in read_metrics(recipe.out)] for recipe in (cut, whole)]
    assert curves[0] == curves[1]


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


def test_a_checkpoint_that_lacks_a_file_is_refused_by_name(finished: Pretrain) -> None:
    checkpoint = finished.out / "checkpoints" / "step_0000004"
    victim = next(checkpoint.glob("*.distcp"))
    victim.unlink()
    with pytest.raises(ValueError, match=f"step_0000004 is missing the file {victim.name}"):
        train(replace(finished, steps=6))


def test_a_changed_byte_is_noticed(finished: Pretrain) -> None:
    victim = next((finished.out / "checkpoints" / "step_0000004").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"the file {victim.name} is not the one that was saved"):
        train(replace(finished, steps=6))


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
    plain, placed = (build(recipe, one_rank, VOCAB.size) for recipe in
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
