"""From one checkpoint and the same rows, every way of sharing the work gives the same losses and gradient norms, and saves the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import everything
from toy_rows import TINY, losses_by_layout, tiny

from mmllm.config import Model, Parallel, Pretrain
from mmllm.launch import launch

ONE = {"one": Parallel()}
DENSE = replace(TINY, num_layers=4)
EXPERTS = replace(TINY, num_experts=4, expert_ffn_hidden_size=32, balance_loss=0.1)
TWO = {"dp 2": Parallel(ranks=2), "tp 2": Parallel(ranks=2, tp=2, sequence_parallel=False), "tp 2 sp": Parallel(ranks=2, tp=2),
       "pp 2": Parallel(ranks=2, pp=2), "pp 2, uneven": Parallel(ranks=2, pp=2, first_stage_layers=1),
       "pp 2, virtual 2": Parallel(ranks=2, pp=2, virtual_stages=2), "cp 2": Parallel(ranks=2, cp=2)}
TWO_EXPERTS = {"ep 2": Parallel(ranks=2, ep=2), "dp 2": Parallel(ranks=2), "tp 2, ep 2": Parallel(ranks=2, tp=2, ep=2),
               "tp 2, within experts": Parallel(ranks=2, tp=2, expert_tp=2), "cp 2": Parallel(ranks=2, cp=2, ep=2)}
FOUR = {"tp 2 pp 2": Parallel(ranks=4, tp=2, pp=2), "dp 2 tp 2": Parallel(ranks=4, tp=2),
        "dp 2 pp 2": Parallel(ranks=4, pp=2), "cp 2 tp 2": Parallel(ranks=4, cp=2, tp=2), "cp 2 pp 2": Parallel(ranks=4, cp=2, pp=2),
        "cp 4": Parallel(ranks=4, cp=4), "tp 2 pp 2, virtual 2": Parallel(ranks=4, tp=2, pp=2, virtual_stages=2),
        "cp 2 tp 2, recomputed": Parallel(ranks=4, cp=2, tp=2, recompute="full")}
FOUR_EXPERTS = {"ep 2 pp 2": Parallel(ranks=4, pp=2, ep=2), "ep 4": Parallel(ranks=4, ep=4),
                "ep 2 tp 2 dp 2": Parallel(ranks=4, tp=2, ep=2), "ep 2 tp 2 pp 2": Parallel(ranks=4, tp=2, pp=2, ep=2)}


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


def same_tensors(out: Path) -> None:
    """What each layout saved again is what was loaded, the optimizer's moments and fp32 weights too."""
    expected = everything(out / "checkpoints" / "step_0000004")
    assert any("exp_avg_sq" in name for name in expected)
    for folder in (out / "again").iterdir():
        found = everything(folder / "step_0000004")
        assert found.keys() == expected.keys(), folder.name
        assert all(torch.equal(found[name], expected[name]) for name in expected), folder.name


def agree(found: dict[str, dict[str, list[float]]], expected: dict[str, list[float]]) -> None:
    assert expected["loss"][0] > expected["loss"][-1] + 0.2                     # it learns, so the gradients count
    for name, values in found.items():
        assert values.keys() == expected.keys()
        for kind, curve in values.items():
            assert curve == pytest.approx(expected[kind], rel=1e-4), f"{name}: {kind}"


@pytest.mark.parametrize(("model", "layouts"), [(DENSE, TWO), (EXPERTS, TWO_EXPERTS)], ids=["dense", "experts"])
def test_two_ranks_agree_with_one_over_ten_steps(model: Model, layouts: dict[str, Parallel], tmp_path: Path) -> None:
    recipe = tiny(tmp_path, steps=10, model=model)
    found = losses(recipe, layouts)
    agree(found, losses(recipe, ONE)["one"])
    same_tensors(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layouts"), [(DENSE, FOUR), (replace(DENSE, tie_embeddings=True), FOUR), (EXPERTS, FOUR_EXPERTS)],
                         ids=["dense", "tied", "experts"])
def test_four_ranks_agree_with_one(model: Model, layouts: dict[str, Parallel], tmp_path: Path) -> None:
    recipe = tiny(tmp_path, model=model)
    found = losses(recipe, layouts)
    agree(found, losses(recipe, ONE)["one"])
    same_tensors(tmp_path)
