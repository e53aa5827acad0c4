"""What we call a layout that works is one that megatron-core builds, and what we refuse it could not."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from toy_rows import TINY, tiny

from mmllm.config import Parallel
from mmllm.megatron.parallel import Layout
from mmllm.megatron.translation import transformer_config
from mmllm.violations import violations

LAYOUT = Layout(rank=0, ranks=1, tp_rank=0, pp_rank=0, cp_rank=0, dp_rank=0, tp=1, pp=1, cp=1, dp=1, device=torch.device("cpu"))


def test_the_stages_we_allow_are_those_that_megatron_builds() -> None:
    allowed = refused = 0
    for layers, pp, chunks, first, last in product((4, 5, 8), (1, 2, 4), (1, 2), (None, 1, 2), (None, 1, 2)):
        parallel = Parallel(ranks=pp, pp=pp, virtual_stages=chunks, first_stage_layers=first, last_stage_layers=last)
        recipe = tiny(Path("x"), model=replace(TINY, num_layers=layers), parallel=parallel, global_batch=8)
        if chunks > 1 and pp == 1:
            assert any("needs parallel.pp above 1" in line for line in violations(recipe))
            continue
        try:
            config = transformer_config(recipe, LAYOUT)
            stages = [sum(get_num_layers_to_build(config, i if chunks > 1 else None, stage) for i in range(chunks)) for stage in range(pp)]
            builds = sum(stages) == layers
        except (AssertionError, ValueError):
            stages, builds = [], False
        assert builds == (violations(recipe) == []), (layers, parallel, stages, violations(recipe))
        if builds:
            assert stages == parallel.stage_layers(layers)
        allowed, refused = allowed + builds, refused + (not builds)
    assert min(allowed, refused) > 20


@pytest.mark.parametrize(("parallel", "model", "line"), [
    ({"ranks": 3, "cp": 2}, {}, "3 ranks are no multiple of tp × pp × cp = 1 × 1 × 2"),
    ({"ranks": 2, "pp": 2, "virtual_stages": 2}, {"num_layers": 6}, "stages of [3, 3] layers cannot be cut into 2 chunks"),
    ({"ranks": 4, "pp": 2, "virtual_stages": 2}, {"num_layers": 4}, "micro-batches of a rank must divide by parallel.pp: rows a step [6]"),
    ({"ranks": 2, "ep": 2}, {}, "parallel.ep is 2, but model.num_experts is 0"),
    ({"ranks": 2, "ep": 2}, {"num_experts": 3}, "model.num_experts 3 cannot be shared out over 2 ranks"),
    ({"ranks": 2, "ep": 4}, {"num_experts": 4}, "2 ranks are no multiple of expert_tp × ep × pp = 1 × 4 × 1"),
    ({"ranks": 2, "tp": 2, "sequence_parallel": False}, {"num_experts": 4}, "experts with parallel.tp 2 need parallel.sequence_parallel"),
    ({"ranks": 2, "tp": 2, "expert_tp": 2}, {"num_experts": 4, "expert_ffn_hidden_size": 33}, "an expert of width 33 cannot be split"),
    ({"ranks": 3, "tp": 3}, {"num_query_groups": 3, "num_attention_heads": 6, "head_dim": 8}, "model.vocab_multiple 128 is no multiple"),
    ({"recompute": "selective", "recompute_modules": ("moe",)}, {}, "names moe, but model.num_experts is 0"),
    ({"recompute": "selective", "recompute_modules": ()}, {}, "names nothing"),
    ({"recompute": "full", "recompute_layers": 9}, {}, "parallel.recompute_layers is 9"),
    ({"ranks": 2, "pp": 2, "first_stage_layers": 2}, {}, "a pipeline stage has no layer"),
    ({}, {"rope_scaling": "yarn", "rope_factor": 4.0}, "model.rope_scaling yarn asks for model.rope_original_len"),
    ({}, {"image_positions": "grid"}, "needs a multiple of 16"),
    ({}, {"num_experts": 4, "experts_per_token": 5}, "model.experts_per_token is 5"),
    ({"cp": 0}, {}, "parallel.cp is 0, must be at least 1"),
])
def test_a_layout_that_cannot_work_is_named_before_ranks_start(parallel: dict[str, Any], model: dict[str, Any], line: str) -> None:
    found = violations(tiny(Path("x"), parallel=Parallel(**parallel), model=replace(TINY, **model), global_batch=6))
    assert any(line in each for each in found), found
