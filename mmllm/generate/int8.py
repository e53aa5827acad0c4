"""A weight matrix in a byte a number: each output channel has its scale, activations stay as they are.

Rounding to 127 steps of a channel's largest weight leaves an error of at most half a step, s / 2 a weight (the plain absmax rule, as
LLM.int8 uses for its regular part, Dettmers et al. 2022, arXiv:2208.07339, section 2.1). A matrix is widened when it is used and the
copy dropped, so memory falls to a quarter of fp32 and half of bf16, and a step on a CPU costs more, not less.

Letters: i inputs, o outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Int8:
    """values · scale is the matrix."""

    values: Tensor  # int8 [i, o], or [o, i] of a table
    scale: Tensor  # of each output, [1, o] or [o, 1], in the precision of activations

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Weight = Tensor | Int8


def to_int8(weight: Tensor, inputs: int = 0) -> Int8:
    """Nearest of 255 steps for each output. inputs: their dimension; 0 of a matrix [i, o], 1 of a table [o, i]"""
    scale = weight.float().abs().amax(inputs, keepdim=True).clamp_min(1e-12) / 127
    return Int8((weight.float() / scale).round().to(torch.int8), scale.to(weight.dtype))


def times(x: Tensor, matrix: Weight, onto: Tensor | None = None) -> Tensor:
    """x [n, i], matrix [i, o] → [n, o], added to `onto` in its place if given."""
    if isinstance(matrix, Tensor):
        return torch.mm(x, matrix) if onto is None else onto.addmm_(x, matrix)
    product = torch.mm(x, matrix.values.to(x.dtype)).mul_(matrix.scale)
    return product if onto is None else onto.add_(product)


def scores(x: Tensor, table: Weight, low: int, high: int | None) -> Tensor:
    """x [..., i], table [o, i] → of its rows low … high − 1 [..., high − low]"""
    if isinstance(table, Tensor):
        return F.linear(x, table[low:high])
    return F.linear(x, table.values[low:high].to(x.dtype)) * table.scale[low:high, 0]


def rows(table: Weight, index: Tensor) -> Tensor:
    """Rows of a table [o, i]. index [...] → [..., i]"""
    if isinstance(table, Tensor):
        return table[index]
    return table.values[index] * table.scale[index]
