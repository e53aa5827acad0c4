"""Floating-point operations that a training step needs, and what a GPU could do: TFLOP/s and MFU.

*Model* operations: what the mathematics asks for, each multiply-add counted as two, the backward pass as two forward ones; recomputed
activations, padding and prompts at the output layer are work that is not counted. The terms are Megatron-LM's
(`num_floating_point_operations` in megatron/training/training.py: projections, attention at half its square because it is causal, gated
MLP, output layer), with two differences that packed rows ask for: attention is over the true lengths of the documents, not over the row,
and the output layer over the tokens that are trained on.

Letters: n tokens of a document, h hidden size, a query heads, g key heads, d width of a head, f width of the MLP, v vocabulary.
"""

import numpy as np
from numpy.typing import ArrayLike

from mmllm.config import Model

FORWARD_AND_BACKWARD = 3
MULTIPLY_ADD = 2

PEAKS = {
    "GB200": 2500.0, "GH200": 989.4, "B200": 2250.0, "B300": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4,
    "H800": 989.4, "H20": 148.0, "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "A10": 125.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "RTX 4090": 165.2, "RTX 3090": 71.0, "RTX 6000 Ada": 364.2, "RTX A6000": 154.8,
    "MI300X": 1307.4, "MI250X": 383.0,
}
"""Dense bf16 TFLOP/s with fp32 accumulation, as the makers' data sheets say (half of what they print "with sparsity"), by a part of the
name that torch gives the device. The first that fits holds."""


def peak(device_name: str) -> tuple[str, float] | None:
    """Row of the table for a device, None where it is not in it."""
    return next(((name, value) for name, value in PEAKS.items()
                 if all(f" {word} " in f" {device_name.replace('-', ' ')} " for word in name.split())), None)


def weights_met(model: Model) -> tuple[int, int]:
    """By a token in a layer's matrices: dense ones, those of the experts it is routed to."""
    h, d = model.hidden_size, model.head_width
    attention = h * d * (2 * model.num_attention_heads + 2 * model.groups)    # queries and output, keys and values
    if not model.num_experts:
        return attention + 3 * h * model.ffn_hidden_size, 0
    return attention + h * model.num_experts, model.experts_per_token * 3 * h * model.expert_width     # the router is dense


def matrix_flops(model: Model) -> int:
    """Of one token in one forward pass through the layers' matrices, 2 a weight that it meets."""
    return MULTIPLY_ADD * model.num_layers * sum(weights_met(model))


def attention_flops(model: Model, length: int) -> int:
    """Of one document in one forward pass: scores and their product with the values, half of each n × n square."""
    return MULTIPLY_ADD * model.num_layers * model.num_attention_heads * model.head_width * length * length


def head_flops(model: Model, vocab_size: int) -> int:
    """Of one token in one forward pass through the output layer."""
    return MULTIPLY_ADD * model.hidden_size * vocab_size


def step_flops(model: Model, vocab_size: int, lengths: ArrayLike, trained_tokens: int) -> int:
    """Of a training step on documents of these lengths, of whose tokens so many are trained on."""
    n = np.asarray(lengths, np.int64)
    forward = int(n.sum()) * matrix_flops(model) + int((n * n).sum()) * attention_flops(model, 1)
    return FORWARD_AND_BACKWARD * (forward + trained_tokens * head_flops(model, vocab_size))
