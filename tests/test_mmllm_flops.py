"""Model operations agree with the formula as published and with counting them in a model that runs; peaks are found by a GPU's name."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_rows import TINY

from mmllm.config import Model
from mmllm.flops import attention_flops, head_flops, matrix_flops, peak, step_flops

LLAMA_8B = Model(num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336)


def test_llama_3_8b_needs_what_its_authors_trainers_publish() -> None:
    """51.5 GFLOP a token at 8,192 tokens: 744 TFLOP/s at 14,451 tokens/s (Megatron-Bridge, performance summary 25.11)."""
    tokens = 8192
    assert step_flops(LLAMA_8B, 128_256, [tokens], tokens) / tokens == pytest.approx(744e12 / 14_451, rel=0.01)


def test_without_attention_it_is_six_a_weight_and_token() -> None:
    model = replace(TINY, num_layers=3)
    weights = 3 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48) + 32 * 100                           # q, k, v, o; MLP; head
    assert step_flops(model, 100, [1] * 10, 10) - 3 * 10 * attention_flops(model, 1) == 6 * 10 * weights


def test_attention_is_half_of_what_the_full_square_takes() -> None:
    n, heads, width = 64, TINY.num_attention_heads, TINY.head_width
    q = torch.zeros(heads, n, width)
    with FlopCounterMode(display=False) as counted:
        (q @ q.mT).softmax(-1) @ q
    assert attention_flops(TINY, n) == TINY.num_layers * counted.get_total_flops() / 2


def test_packed_documents_need_less_than_one_of_the_same_length() -> None:
    assert step_flops(TINY, 100, [128, 128], 200) < step_flops(TINY, 100, [256], 200)
    assert step_flops(TINY, 100, [256], 200) - step_flops(TINY, 100, [256], 100) == 3 * 100 * head_flops(TINY, 100)


def test_of_experts_those_count_that_a_token_meets() -> None:
    dense, router = matrix_flops(TINY), 2 * TINY.num_layers * TINY.hidden_size * 8
    assert matrix_flops(replace(TINY, num_experts=8, experts_per_token=1)) == dense + router


@pytest.mark.parametrize(("device", "expected"), [
    ("NVIDIA H100 80GB HBM3", ("H100", 989.4)), ("NVIDIA H100 PCIe", ("H100 PCIe", 756.0)), ("NVIDIA H200", ("H200", 989.4)),
    ("NVIDIA A100-SXM4-80GB", ("A100", 312.0)), ("NVIDIA GB200", ("GB200", 2500.0)), ("NVIDIA B200", ("B200", 2250.0)),
    ("NVIDIA L4", ("L4", 121.0)), ("NVIDIA L40S", ("L40S", 362.0)), ("NVIDIA GeForce RTX 4090", ("RTX 4090", 165.2)),
    ("AMD Instinct MI300X", ("MI300X", 1307.4)), ("NVIDIA TITAN V", None)])
def test_a_peak_is_found_by_the_name_torch_gives(device: str, expected: tuple[str, float] | None) -> None:
    assert peak(device) == expected
