"""Checkpoints are written beside the training, whole or not at all, and a full disk costs no more than a checkpoint."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from checkpoints import everything, same, whole_checkpoints
from toy_rows import TINY, VOCAB, ToyRows, tiny, train

from data.loader import Row
from mmllm.config import Parallel, Pretrain
from mmllm.launch import RankFailed, launch
from mmllm.manifest import verify, whole
from mmllm.megatron import checkpoint, optim, parallel
from mmllm.megatron.checkpoint import SaveFailed
from mmllm.megatron.model import build
from mmllm.megatron.train import fit
from mmllm.run import read_metrics

LITTLE = 40_000
"""bytes: more than metrics.jsonl, less than a checkpoint"""


@dataclass(frozen=True)
class FullDisk(ToyRows):
    """From row `first` to `last` no file can grow beyond LITTLE bytes: a full disk that needs no disk."""

    first: int = 0
    last: int = 1 << 30

    def row(self, number: int) -> Row:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE if self.first <= number < self.last else hard, hard))
        return super().row(number)


@pytest.fixture(autouse=True)
def files_may_grow_again() -> Iterator[None]:
    yield
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def fill(recipe: Pretrain) -> None:
    """What the ranks of a test run: their disk is full from the first row on."""
    fit(recipe, FullDisk())


def test_in_the_background_every_checkpoint_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    waits, goes_on = (tiny(tmp_path / str(flag), steps=6, save_every=1, keep_last=9, async_save=flag) for flag in (False, True))
    train(waits)
    train(goes_on)
    assert whole_checkpoints(waits) == whole_checkpoints(goes_on) and len(whole_checkpoints(waits)) == 6
    for name in whole_checkpoints(waits):
        assert same(waits.out / "checkpoints" / name, goes_on.out / "checkpoints" / name)
        verify(goes_on.out / "checkpoints" / name)


def test_what_training_changes_while_it_is_written_is_not_in_it(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, model=replace(TINY, hidden_size=256, ffn_hidden_size=512))
    layout = parallel.start(Parallel(), 0)
    try:
        model = optim.wrap(build(recipe, layout, VOCAB.size))
        optimizer = optim.make(recipe, model)
        before = checkpoint.save(tmp_path, 1, model, optimizer, {}, 9)
        saving = checkpoint.begin(tmp_path, 2, model, optimizer, {}, background=True)
        with torch.no_grad():
            for chunk in model:
                for parameter in chunk.parameters():
                    parameter.fill_(7.0)
            for part in optimizer.chained_optimizers:
                for moments in part.optimizer.state.values():
                    for moment in moments.values():
                        moment.fill_(7.0)
                for group in part.optimizer.param_groups:
                    for master in group["params"]:
                        master.fill_(7.0)
        assert same(checkpoint.complete(saving, 9), before)
        after = checkpoint.save(tmp_path, 3, model, optimizer, {}, 9)
        assert not same(after, before)
    finally:
        parallel.stop()


def test_a_failed_save_is_said_once_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_run, recipe = (tiny(tmp_path / name, steps=8, save_every=2, keep_last=9) for name in ("whole", "full"))
    train(whole_run)
    capsys.readouterr()
    fit(recipe, FullDisk(first=12, last=20))                                    # full in the fourth step, free in the sixth
    lines = [line for line in capsys.readouterr().out.splitlines() if "not written" in line]
    assert len(lines) == 1 and "checkpoint of step 4 was not written: rank 0, __0_0.distcp: " in lines[0] and "MB free" in lines[0]
    assert sorted(path.name for path in (recipe.out / "checkpoints").iterdir()) == ["step_0000002", "step_0000006", "step_0000008"]
    assert same(recipe.out / "checkpoints/step_0000008", whole_run.out / "checkpoints/step_0000008")
    assert [record["step"] for record in read_metrics(recipe.out)] == list(range(1, 9))


def test_by_the_other_rule_a_failed_save_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed, match="checkpoint of step 4 was not written"):
        fit(tiny(tmp_path, steps=8, save_every=2, failed_save="stop"), FullDisk(first=12))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000002"]


def test_the_last_checkpoint_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed, match="checkpoint of step 3 was not written"):
        fit(tiny(tmp_path, steps=3), FullDisk())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_on_two_ranks_all_hear_of_it_in_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(RankFailed, match="SaveFailed: the checkpoint of step 2 was not written: rank"):
        launch("test_mmllm_checkpoint:fill", tiny(tmp_path, steps=2, parallel=Parallel(ranks=2)), 2)
    assert "Traceback" not in capfd.readouterr().err
    assert whole(tmp_path / "checkpoints") == []


def test_a_disk_that_is_really_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        recipe = tiny(disk / "run", steps=6, save_every=1, keep_last=9)
        with pytest.raises(SaveFailed, match=r"step 6 was not written.*\(0\.\d MB free\)"):
            train(recipe)
        saved = whole(recipe.out / "checkpoints")
        assert saved and sorted((recipe.out / "checkpoints").iterdir()) == saved
        for path in saved:
            verify(path)
        assert "the run goes on" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", disk], check=True)


def test_some_are_kept_for_ever(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, steps=7, save_every=1, keep_last=2, keep_every=3)
    train(recipe)
    assert whole_checkpoints(recipe) == ["step_0000003", "step_0000006", "step_0000007"]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.suffix]


def test_a_broken_name_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, steps=2, save_every=1)
    train(recipe)
    for suffix in ("tmp", "deleted"):
        (tmp_path / f"checkpoints/step_0000009.{suffix}").mkdir()
    (tmp_path / "checkpoints/step_0000009.broken").mkdir()
    train(replace(recipe, steps=3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000002", "step_0000003", "step_0000009.broken"]
    assert json.loads((tmp_path / "checkpoints/step_0000003/state.json").read_text())["step"] == 3
    assert everything(tmp_path / "checkpoints/step_0000003")
