"""Validation measures held-out rows between steps that do not notice, and says the same under any number of ranks."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from checkpoints import same
from toy_rows import ToyRows, tiny

from data.config import DataConfig
from data.loader import Row
from data.mixture import Source, Stage
from mmllm.config import Parallel, Pretrain
from mmllm.launch import launch
from mmllm.megatron.train import fit
from mmllm.run import read_metrics


@dataclass(frozen=True)
class HeldRows(ToyRows):
    """Rows far from those trained on."""

    def row(self, number: int) -> Row:
        return super().row(10_000 + number)


def validated(recipe: Pretrain) -> None:
    fit(recipe, ToyRows(), HeldRows())


def measured(recipe: Pretrain) -> dict[int, dict[str, float]]:
    return {record["step"]: {name: value for name, value in record.items() if name.startswith("validation")}
            for record in read_metrics(recipe.out) if any(name.startswith("validation") for name in record)}


def test_with_and_without_the_weights_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    without, with_it = (tiny(tmp_path / str(every), steps=6, log_every=4, validate_every=every, validation_rows=8) for every in (0, 2))
    validated(without)
    validated(with_it)
    assert same(with_it.out / "checkpoints/step_0000006", without.out / "checkpoints/step_0000006")
    found = measured(with_it)
    assert list(found) == [2, 4, 6] and not measured(without)
    assert found[2].keys() == {"validation/loss", "validation/loss/text", "validation/loss/image"}
    assert found[6]["validation/loss"] < found[2]["validation/loss"]
    ours, theirs = ({record["step"]: record["loss"] for record in read_metrics(recipe.out)} for recipe in (with_it, without))
    assert all(ours[step] == theirs[step] for step in theirs)


def test_two_ranks_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    one = tiny(tmp_path / "one", steps=2, validate_every=2, validation_rows=4)
    two = replace(one, out=tmp_path / "two", parallel=Parallel(ranks=2))
    validated(one)
    launch("test_mmllm_validate:validated", two, 2)
    assert measured(two)[2] == pytest.approx(measured(one)[2], rel=1e-5)


def test_held_out_shards_are_those_of_the_data_with_another_name() -> None:
    recipe = tiny(Path("x"), data=DataConfig(shards="tokens", row_len=256))
    assert recipe.data.held_out(recipe.validation_prefix) == replace(recipe.data, prefix="seen")
    mixed = replace(recipe, data=DataConfig(row_len=256, stages=(
        Stage(sources=(Source(shards="a"),)), Stage(from_step=9, sources=(Source(shards="b", max_epochs=1.0), Source(shards="c"))))))
    (stage,) = mixed.data.held_out(mixed.validation_prefix).stages
    assert stage.from_step == 0 and [source.name for source in stage.sources] == ["b/seen*", "c/seen*"]
    assert stage.sources[0].max_epochs is None
