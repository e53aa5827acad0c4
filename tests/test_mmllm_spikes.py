"""A step far out of line is found by a written rule, skipped or refused, and the run goes on as the rule says."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import same
from toy_rows import ToyRows, tiny, train

from data.loader import Row
from mmllm.config import Parallel, Pretrain, Spikes
from mmllm.launch import launch
from mmllm.megatron.train import fit
from mmllm.run import read_metrics
from mmllm.spikes import Seen, accepted, not_finite, skipped, spike

SKIP = Spikes(rule="skip", window=4, deviations=6.0, in_a_row=2)


def test_a_spike_is_far_above_the_mean_of_the_window() -> None:
    seen = Seen()
    for value in (2.0, 2.1, 1.9, 2.0):
        assert spike(seen, 9.0, 9.0, SKIP) == ""                                # the window is not full
        seen = accepted(seen, value, value, SKIP)
    limit = float(np.mean(seen.loss) + 6 * np.std(seen.loss))
    assert spike(seen, limit - 1e-6, limit - 1e-6, SKIP) == ""
    assert spike(seen, limit + 1e-6, 2.0, SKIP).startswith("loss 2.424 is above 2.424, the mean 2 of the last 4 steps")
    assert spike(seen, 2.0, limit + 1e-6, SKIP).startswith("grad_norm")
    assert spike(seen, 9.0, 9.0, replace(SKIP, rule="off")) == ""


def test_the_window_moves_and_spikes_stay_out_of_it() -> None:
    seen = Seen()
    for value in range(6):
        seen = accepted(seen, float(value), 0.0, SKIP)
    assert seen.loss == (2.0, 3.0, 4.0, 5.0)
    assert skipped(seen) == replace(seen, in_a_row=1, skipped=1)
    assert accepted(skipped(seen), 6.0, 0.0, SKIP).in_a_row == 0


def test_what_is_not_finite_is_named() -> None:
    assert not_finite({"loss": float("inf"), "z": 1.0, "grad_norm": float("nan")}) == ["loss", "grad_norm"]


@dataclass(frozen=True)
class NoisyRows(ToyRows):
    """Rows of some steps are of ids never seen before or after: a loss far above the others, once those are learned."""

    bad: tuple[int, ...] = ()

    def row(self, number: int) -> Row:
        row = super().row(number)
        if number // 4 not in self.bad:
            return row
        draw = np.random.default_rng(number)
        strange = draw.integers(self.vocab.first_image + 50, self.vocab.first_image + 90, len(row.labels))
        return replace(row, labels=np.where(row.loss_weight > 0, strange, row.labels))


def noisy(recipe: Pretrain) -> None:
    fit(recipe, NoisyRows(bad=(30,)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    """34 steps, saved after the 28th: the next steps' losses are close to each other."""
    recipe = tiny(tmp_path_factory.mktemp("spikes") / "run", steps=34, save_every=28, spikes=SKIP, keep_last=9)
    fit(recipe, NoisyRows(bad=(30,)))
    return recipe


def test_a_spike_is_skipped_counted_and_its_samples_named(learned: Pretrain) -> None:
    records = {record["step"]: record for record in read_metrics(learned.out)}
    assert [step for step, record in records.items() if "spike" in record] == [31]
    assert records[31]["skipped"] == 1 and records[31]["samples"] == "toy-120, toy-121, toy-122, toy-123"
    assert records[32]["loss"] < records[31]["loss"] - 0.5                     # the weights did not move


def test_the_update_of_a_skipped_step_is_not_made(tmp_path: Path) -> None:
    before = tiny(tmp_path, steps=30, spikes=SKIP)
    fit(before, NoisyRows(bad=(30,)))
    fit(replace(before, steps=31), NoisyRows(bad=(30,)))
    assert same(tmp_path / "checkpoints/step_0000030", tmp_path / "checkpoints/step_0000031")


def test_a_continued_run_judges_as_if_it_had_not_stopped(learned: Pretrain, tmp_path: Path) -> None:
    cut = replace(learned, out=tmp_path / "cut", steps=29)
    fit(cut, NoisyRows(bad=(30,)))
    fit(replace(cut, steps=34), NoisyRows(bad=(30,)))
    whole, ours = ([record.get("skipped") for record in read_metrics(recipe.out)] for recipe in (learned, cut))
    assert whole == ours
    saved = [json.loads((recipe.out / "checkpoints/step_0000034/state.json").read_text())["spikes"] for recipe in (learned, cut)]
    assert all(len(each["loss"]) == 4 and each["skipped"] == 1 for each in saved)


def test_two_ranks_decide_the_same(learned: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    two = replace(learned, out=tmp_path / "two", parallel=Parallel(ranks=2))
    launch("test_mmllm_spikes:noisy", two, 2)
    assert [record["step"] for record in read_metrics(two.out) if "spike" in record] == [31]
    assert len(list(two.out.glob("bad_step_0000030_rank_*.pt"))) == 2


def test_told_to_stop_at_a_spike_it_stops_and_keeps_the_batch(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, steps=34, spikes=replace(SKIP, rule="stop"))
    with pytest.raises(FloatingPointError, match=r"step 31: loss .* is above .*its samples are toy-120.*bad_step_0000030_rank_0.pt"):
        fit(recipe, NoisyRows(bad=(30,)))


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"spike number 3 in a row, spikes\.in_a_row allows 2"):
        fit(tiny(tmp_path, steps=36, spikes=SKIP), NoisyRows(bad=(30, 31, 32, 33)))


def test_without_spikes_the_rule_changes_nothing(tmp_path: Path) -> None:
    off, on = tiny(tmp_path / "off", steps=5), tiny(tmp_path / "on", steps=5, spikes=replace(SKIP, deviations=1e9))
    train(off)
    train(on)
    assert same(on.out / "checkpoints/step_0000005", off.out / "checkpoints/step_0000005")
