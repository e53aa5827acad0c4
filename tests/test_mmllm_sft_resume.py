"""A tuning run that is interrupted, measured on the way, or offloaded ends where it would have ended."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sft_world
import tiny_model
from sft_world import recipe, start, talk, wait_for

from data.config import DataConfig
from mmllm import hf
from mmllm.launch import STOPPED
from mmllm.manifest import newest
from mmllm.run import read_metrics
from mmllm.runs.sft import conversations, main
from mmllm.runs.sft_checkpoint import go_on, state
from mmllm.runs.sft_loss import document_groups
from mmllm.runs.sft_recipe import Lora, Sft, violations

world = sft_world.world


def settings(world: Path, out: Path, **changes: object) -> Sft:
    return recipe(world, out, **{"data": talk(world), "zero_stage": 3, "lora": Lora(rank=4, alpha=8.0, dropout=0.1), **changes})


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> Path:
    return main(settings(world, world / "run"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out)]


def interrupted(settings: Sft, folder: Path) -> None:
    """Up to its second checkpoint, then killed."""
    process = start(settings, folder)
    wait_for(lambda: (found := newest(settings.out / "checkpoints")) and found.name >= "step_0000004", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_broken_checkpoint_and_half_of_one_are_passed_over_and_the_bits_are_the_same(
        world: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With dropout, adapters, ZeRO 3, and rows made ahead and losses on held-out ones, of which an undisturbed run knows nothing."""
    again = settings(world, tmp_path / "run", save_every=2, keep_last=2, validate_every=3, validation_rows=4, loader_workers=1)
    interrupted(again, tmp_path)
    checkpoints = again.out / "checkpoints"
    broken = newest(checkpoints)
    assert broken is not None
    victim = max(broken.glob("*.pt"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    shutil.copytree(broken, checkpoints / "step_0000005.tmp")
    folder = main(again)
    said = capfd.readouterr().out
    assert f"the file {victim.name} is not the one that was saved: set aside" in said and "steps 2–6" in said
    assert weights(folder) == weights(undisturbed) and losses(again.out) == losses(world / "run")
    held = [record["step"] for record in read_metrics(again.out) if "validation/loss/text" in record]
    assert held == [3, 6] and not checkpoints.exists()


def test_another_recipe_model_or_data_is_not_continued(world: Path, tmp_path: Path) -> None:
    made, folder = settings(world, world), hf.open_folder(world / "model")
    saved = json.loads(json.dumps(state(4, made, conversations(made, folder, made.data))))
    shutil.copytree(world / "talk", tmp_path / "elsewhere")
    moved = replace(made, data=replace(made.data, shards=tmp_path / "elsewhere"), log_every=3, validate_every=2, out=tmp_path)
    assert go_on(saved, moved, conversations(moved, folder, moved.data)) == []
    other = replace(made, lr=0.5, init=tiny_model.folder(tmp_path / "model", std=0.09), data=talk(world, "editing"))
    lr, init, data = go_on(saved, other, conversations(other, folder, other.data))
    assert lr == "lr (0.003 then, 0.5 now)" and init.startswith("init (weights ") and data.startswith("data order")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_it_saves_and_the_same_command_continues(world: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    again = settings(world, tmp_path / "run")
    process = start(again, tmp_path)
    wait_for((again.out / "metrics.jsonl").exists, process)
    process.send_signal(number)
    assert process.wait() == STOPPED and newest(again.out / "checkpoints")
    assert weights(main(again)) == weights(undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(world: Path, tmp_path: Path) -> None:
    """Saving after each step, so that many a kill falls into a save."""
    changes: dict[str, Any] = {"steps": 60, "zero_stage": 2}
    expected = main(settings(world, tmp_path / "whole", **changes))
    again, moments, during = settings(world, tmp_path / "run", save_every=1, **changes), random.Random(0), 0
    for _ in range(10):
        process = start(again, tmp_path)
        before = newest(again.out / "checkpoints")
        wait_for(lambda before=before: newest(again.out / "checkpoints") != before, process)
        time.sleep(moments.random() * 0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        during += bool(list((again.out / "checkpoints").glob("*.tmp")))
    assert weights(main(again)) == weights(expected) and during


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "offload", "precision"), [
    (1, "optimizer", "fp32"), (2, "optimizer", "fp32"), (3, "optimizer", "fp32"), (3, "all", "fp32"), (3, "all", "bf16")])
def test_offloaded_states_take_the_same_steps(world: Path, tmp_path: Path, zero_stage: Any, offload: Any, precision: Any) -> None:
    plain = recipe(world, world / "plain", data=talk(world), micro_batch=1)
    if not (plain.out / "hf").exists():
        main(plain)
    main(replace(plain, out=tmp_path / "run", zero_stage=zero_stage, offload=offload, precision=precision))
    assert losses(tmp_path / "run") == pytest.approx(losses(plain.out), rel=1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.slow
def test_ranks_with_unequal_groups_agree_under_zero_3(world: Path, tmp_path: Path) -> None:
    data = DataConfig(shards=world / "talk", prefix="", row_len=2048)
    plain = recipe(world, tmp_path / "plain", data=data, zero_stage=2)
    rows = conversations(plain, hf.open_folder(plain.init), data)
    counts = [[len(document_groups([rows.row(4 * step + 2 * rank + i) for i in range(2)])) for rank in range(2)] for step in range(6)]
    assert any(a != b for a, b in counts)
    main(plain)
    main(replace(plain, out=tmp_path / "run", zero_stage=3))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_mistakes_of_the_new_fields_are_named_at_once(world: Path) -> None:
    found = violations(settings(world, world, lora=Lora(rank=-1, alpha=0.0, dropout=1.0), offload="all", zero_stage=2, keep_last=0,
                                validate_every=1, validation_rows=3, save_every=-1))
    for line in ("lora.rank is -1", "lora.alpha is 0.0", "lora.dropout is 1.0", "offload 'all' needs zero_stage 3", "keep_last is 0",
                 "validation_rows 3 is no positive multiple of ranks 2", "save_every is -1"):
        assert any(line in each for each in found), line


def test_the_recipe_is_written_as_it_was_run(world: Path, undisturbed: Path) -> None:
    written = json.loads((world / "run" / "recipe.json").read_text())
    assert written["lora"]["rank"] == 4 and written["plan_hash"] and written["conversations"] == "auto"
