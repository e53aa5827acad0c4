"""Our words for FP8, in the three configurations of megatron-core that must agree."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from toy_rows import TINY, tiny

from data.config import DataConfig
from mmllm.config import Fp8, Parallel, Pretrain
from mmllm.megatron import fp8
from mmllm.megatron.parallel import Layout
from mmllm.megatron.translation import transformer_config
from mmllm.violations import violations

LAYOUT = Layout(rank=0, ranks=1, tp_rank=0, pp_rank=0, cp_rank=0, dp_rank=0, tp=1, pp=1, cp=1, dp=1, device=torch.device("cpu"))
ENDS = {"first_layers_bf16": 0, "last_layers_bf16": 0}
SETTINGS = {"delayed": Fp8(scaling="delayed", **ENDS), "tensorwise": Fp8(scaling="tensorwise"), "blockwise": Fp8(scaling="blockwise")}


def rows(row_len: int) -> DataConfig:
    return DataConfig(shards=Path("toy"), row_len=row_len)


def recipe(setting: Fp8, **changes: object) -> Pretrain:
    model = replace(TINY, hidden_size=512, head_dim=128, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=1024, num_layers=4)
    return replace(tiny(Path("x"), model=model, precision="bf16", fp8=setting, data=rows(1024)), **changes)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_three_configurations_agree(name: str) -> None:
    config = transformer_config(recipe(SETTINGS[name]), LAYOUT)                 # its own __post_init__ checks it
    assert (config.fp8, config.fp8_recipe, config.bf16) == ("hybrid", name, True)
    assert OptimizerConfig(**fp8.optimizer_fields(config)).fp8_recipe == name
    assert DistributedDataParallelConfig(**fp8.gradient_fields(config)).fp8_param_gather == config.fp8_param == (name != "blockwise")
    assert config.first_last_layers_bf16 == (name != "delayed")
    assert not config.fp8_dot_product_attention
    if name == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    else:
        assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)


def test_without_fp8_nothing_is_set() -> None:
    config = transformer_config(recipe(Fp8()), LAYOUT)
    assert config.fp8 is None
    assert fp8.optimizer_fields(config) == {}
    assert fp8.gradient_fields(config) == {"fp8_param_gather": False}


@pytest.mark.parametrize(("setting", "changes", "line"), [
    (SETTINGS["tensorwise"], {"precision": "fp32"}, "fp8 needs precision bf16"),
    (SETTINGS["tensorwise"], {"data": rows(1032)}, "multiples of 16 × 1 .* 1 × 1032"),
    (SETTINGS["tensorwise"], {"parallel": Parallel(ranks=2, tp=2), "data": rows(1040)}, "16 × 2"),
    (SETTINGS["blockwise"], {"data": rows(1040)}, "multiples of 128 × 1"),
    (SETTINGS["blockwise"], {"model": replace(TINY, hidden_size=512, head_dim=64, ffn_hidden_size=1000)},
     "model.ffn_hidden_size of a rank is 1000"),
    (Fp8(scaling="delayed"), {}, "delayed scaling keeps no layer in bf16"),
    (replace(SETTINGS["blockwise"], params=True), {}, "blockwise scaling keeps its weights in bf16"),
    (SETTINGS["delayed"], {"parallel": Parallel(recompute="selective", recompute_modules=("layernorm",))},
     "delayed scaling does not allow"),
    (replace(SETTINGS["tensorwise"], first_layers_bf16=5), {}, "layers of a stage = 4"),
])
def test_what_the_hardware_asks_is_asked_before_ranks_start(setting: Fp8, changes: dict[str, object], line: str) -> None:
    found = violations(recipe(setting, **changes))
    assert any(re.search(line, each) for each in found), found


@pytest.mark.parametrize("name", SETTINGS)
def test_aligned_rows_and_widths_pass(name: str) -> None:
    assert violations(recipe(SETTINGS[name])) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_in_fp8_is_close_to_bf16(name: str) -> None:
    from toy_rows import VOCAB, ToyRows

    from mmllm.megatron import parallel
    from mmllm.megatron.batch import micro_batches
    from mmllm.megatron.model import build
    layout, found = parallel.start(Parallel(), 0), list[float]()
    for setting in (Fp8(), SETTINGS[name]):
        here = recipe(setting)
        [decoder] = build(here, layout, VOCAB.size)
        [batch] = micro_batches([ToyRows(row_len=1024).row(0)], VOCAB, here, layout)
        loss, _ = decoder(batch.tokens, None, None, labels=batch.targets, packed_seq_params=batch.packed)
        loss.backward()
        found.append(float(loss))
    parallel.stop()
    assert found[1] == pytest.approx(found[0], rel=1e-2)
