"""From one checkpoint and the same rows, every way of sharing the work gives the same losses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy_rows import TINY, losses_by_layout, tiny

from mmllm.config import Parallel, Pretrain
from mmllm.launch import launch

ONE = {"one": Parallel()}
TWO = {"dp 2": Parallel(ranks=2), "tp 2": Parallel(ranks=2, tp=2), "pp 2": Parallel(ranks=2, pp=2)}
FOUR = {"tp 2 pp 2": Parallel(ranks=4, tp=2, pp=2), "dp 2 tp 2": Parallel(ranks=4, tp=2),
        "dp 2 pp 2": Parallel(ranks=4, pp=2)}


def losses(recipe: Pretrain, layouts: dict[str, Parallel]) -> dict[str, dict[str, list[float]]]:
    ranks = next(iter(layouts.values())).ranks
    if ranks == 1:
        losses_by_layout((recipe, layouts))                                     # in this process
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            launch("toy_rows:losses_by_layout", (recipe, layouts), ranks)
    found: dict[str, dict[str, list[float]]] = json.loads((recipe.out / f"losses_{ranks}.json").read_text())
    return found


def agree(found: dict[str, dict[str, list[float]]], expected: dict[str, list[float]]) -> None:
    assert expected["loss"][0] > expected["loss"][-1] + 0.3                     # it learns, so the gradients count
    for name, values in found.items():
        for kind, curve in values.items():
            assert curve == pytest.approx(expected[kind], rel=1e-4), f"{name}: {kind}"


def test_tp_pp_and_dp_agree_with_one_rank_over_twenty_steps(tmp_path: Path) -> None:
    found = losses(tiny(tmp_path), TWO)
    agree(found, losses(tiny(tmp_path), ONE)["one"])


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_four_ranks_agree_with_one(tied: bool, tmp_path: Path) -> None:
    recipe = tiny(tmp_path, model=replace(TINY, tie_embeddings=tied))
    found = losses(recipe, FOUR)
    agree(found, losses(recipe, ONE)["one"])
