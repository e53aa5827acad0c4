"""A weight matrix in a byte a number: each output channel has its scale, activations stay as they are.

Rounding to 127 steps of a channel's largest weight leaves an error of at most half a step, s / 2 a weight (the plain absmax rule, as
LLM.int8 uses for its regular part, Dettmers et al. 2022, arXiv:2208.07339, section 2.1). A matrix is widened when it is used and the
copy dropped, so memory falls to a quarter of fp32 and half of bf16, and a step on a CPU costs more, not less.

Letters: o outputs, i inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Int8:
    """values · scale is the matrix."""

    values: Tensor  # int8 [o, i]
    scale: Tensor  # [o, 1], in the precision of activations

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Weight = Tensor | Int8


def to_int8(weight: Tensor) -> Int8:
    """Nearest of 255 steps for each output channel. weight [o, i]"""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return Int8((weight.float() / scale).round().to(torch.int8), scale.to(weight.dtype))


def linear(x: Tensor, weight: Weight, low: int = 0, high: int | None = None) -> Tensor:
    """x [..., i] → [..., high − low], by these rows of the matrix."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight[low:high])
    return F.linear(x, weight.values[low:high].to(x.dtype)) * weight.scale[low:high, 0]


def rows(weight: Weight, index: Tensor) -> Tensor:
    """Rows of the matrix. index [...] → [..., i]"""
    if isinstance(weight, Tensor):
        return weight[index]
    return weight.values[index] * weight.scale[index]
