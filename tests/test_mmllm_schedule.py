"""Rates and batch sizes are functions of the step: their shapes, their rows, and what a continued run may change."""

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import same
from toy_rows import ToyRows, tiny, train

from mmllm.config import Optim, Parallel, Spikes, batch_at, rows_before
from mmllm.launch import launch
from mmllm.megatron.optim import lr_scale
from mmllm.megatron.train import fit
from mmllm.run import read_metrics
from mmllm.violations import check

RAMP = ((2, 8), (5, 12))


def test_wsd_stays_and_falls_at_the_end() -> None:
    wsd = Optim(lr=1.0, warmup_steps=10, schedule="wsd", decay_ratio=0.2, min_lr_ratio=0.1)
    for decay, middle in (("linear", 0.55), ("1-sqrt", 1 - 0.9 * 0.5**0.5)):
        scales = [lr_scale(step, 100, replace(wsd, decay=decay)) for step in range(100)]
        assert scales[10:81] == [1.0] * 71
        assert scales[90] == pytest.approx(middle)
        assert lr_scale(100, 100, replace(wsd, decay=decay)) == pytest.approx(0.1)
        assert scales[80:] == sorted(scales[80:], reverse=True)


def test_a_longer_wsd_run_is_the_same_until_the_shorter_one_falls() -> None:
    wsd = Optim(lr=1.0, warmup_steps=10, schedule="wsd")
    assert [lr_scale(step, 100, wsd) for step in range(80)] == [lr_scale(step, 1000, wsd) for step in range(80)]


def test_inverse_sqrt_halves_as_the_steps_become_four_times_as_many() -> None:
    optim = Optim(lr=1.0, warmup_steps=25, schedule="inverse_sqrt", min_lr_ratio=0.2)
    assert lr_scale(24, 10_000, optim) == 1.0
    assert lr_scale(99, 10_000, optim) == pytest.approx(0.5)
    assert lr_scale(9_999, 10_000, optim) == 0.2


def test_rows_of_a_ramp_follow_each_other_without_gap() -> None:
    recipe = tiny(Path("x"), batch_ramp=RAMP)
    assert [batch_at(recipe, step) for step in range(7)] == [4, 4, 8, 8, 8, 12, 12]
    assert [rows_before(recipe, step) for step in range(8)] == [sum(batch_at(recipe, s) for s in range(step)) for step in range(8)]


def test_a_ramp_continues_bit_for_bit_and_counts_its_rows(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "whole", steps=7, batch_ramp=RAMP, save_every=3, keep_last=9)
    train(whole)
    cut = replace(whole, out=tmp_path / "cut")
    train(replace(cut, steps=3))
    train(cut)
    # the cosine knows the run's length: only rows can be compared where a shorter run ended
    assert [record["rows"] for record in read_metrics(cut.out)] == [rows_before(whole, step) for step in range(1, 8)]
    again = replace(whole, out=tmp_path / "again")
    (again.out / "checkpoints").mkdir(parents=True)
    (whole.out / "checkpoints/step_0000003").rename(again.out / "checkpoints/step_0000003")
    train(again)
    assert same(again.out / "checkpoints/step_0000007", whole.out / "checkpoints/step_0000007")


def test_two_ranks_take_the_rows_of_a_ramp_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    one = tiny(tmp_path / "one", steps=6, batch_ramp=RAMP)
    two = replace(one, out=tmp_path / "two", parallel=Parallel(ranks=2))
    train(one)
    launch("toy_rows:train", two, 2)
    losses = [[record["loss"] for record in read_metrics(recipe.out)] for recipe in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_ramp_may_grow_later_but_not_where_it_has_been(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, steps=3)
    train(recipe)
    with pytest.raises(ValueError, match=r"rows of the first 3 steps \(12 then, 20 now: global_batch, batch_ramp\)"):
        train(replace(recipe, steps=5, batch_ramp=((1, 8),)))
    train(replace(recipe, steps=5, batch_ramp=((4, 8),)))
    assert read_metrics(tmp_path)[-1]["rows"] == 24


def test_every_mistake_in_a_schedule_is_listed() -> None:
    recipe = tiny(Path("x"), batch_ramp=((3, 6), (2, 8)), parallel=Parallel(ranks=4), validate_every=1, validation_rows=6, keep_every=-1,
                  spikes=Spikes(window=1), peak_tflops=0.0, optim=Optim(lr=1.0, schedule="inverse_sqrt", decay_ratio=2.0))
    with pytest.raises(ValueError) as caught:
        check(recipe)
    for part in ("batch_ramp changes at steps [3, 2]", "6 rows from step 3, which is no positive multiple",
                 "validation_rows 6 is no positive", "keep_every is -1", "spikes.window 1 must be at least 2", "peak_tflops is 0.0",
                 "optim.decay_ratio is 2.0", "optim.warmup_steps is 0, must be at least 1"):
        assert part in str(caught.value), part


def test_tflops_and_mfu_are_told(tmp_path: Path) -> None:
    fit(tiny(tmp_path, steps=2, peak_tflops=0.5), ToyRows())
    record = read_metrics(tmp_path)[-1]
    assert record["tflops"] > 0 and record["mfu"] == pytest.approx(record["tflops"] / 0.5)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_the_devices_and_mfu_has_its_peak(tmp_path: Path) -> None:
    import torch

    from mmllm.flops import peak
    fit(tiny(tmp_path, steps=2), ToyRows())
    record = read_metrics(tmp_path)[-1]
    assert record["memory_bytes"] == torch.cuda.max_memory_allocated()
    assert ("mfu" in record) == (peak(torch.cuda.get_device_name()) is not None)
