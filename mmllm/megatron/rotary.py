"""Rotation of queries and keys on a CPU, in one pass with the norm of each head.

Letters: t tokens of a micro-batch, g key heads of this rank, r query heads for each, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmllm.megatron import rope


class RotaryTable:
    """cos and sin of every position up to the longest seen; halves rotated as in Llama: (x1, x2) → (x1 c − x2 s, x2 c +
    x1 s)."""

    def __init__(self, frequencies: Tensor) -> None:
        """frequencies [d / 2]"""
        self.frequencies = frequencies
        self.cos, self.sin = frequencies.new_empty(0, len(frequencies)), frequencies.new_empty(0, len(frequencies))

    def at(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[t], or [3, t] on a grid → cos and sin, each [t, d / 2]."""
        longest = int(position.max()) + 1
        if longest > len(self.cos):
            angle = torch.outer(torch.arange(longest, dtype=torch.float32), self.frequencies)
            self.cos, self.sin = angle.cos(), angle.sin()
        if position.dim() == 1:
            return self.cos[position].to(dtype), self.sin[position].to(dtype)
        turned = position.t()[:, rope.axes(len(self.frequencies))]             # [3, t] -> [t, d / 2], each frequency by its axis
        return self.cos.gather(0, turned).to(dtype), self.sin.gather(0, turned).to(dtype)


class RotaryNorm(torch.autograd.Function):
    """RMSNorm of each head, its weight, then rotation, in one pass over queries and keys together; backward by hand.

    x [t, g, r + 1, d], the r queries and the key of each group; weight [r + 1, d]; cos, sin [t, d / 2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        half = x.size(-1) // 2
        if weight is None:
            inverse, normed, scaled = None, None, x
        else:
            inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            inverse = inverse.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)          # [t, g, r + 1, 1]
            normed = x * inverse
            scaled = normed * weight
        out = torch.empty(x.shape, dtype=x.dtype)
        rotate(scaled, cos, sin, half, out)
        ctx.save_for_backward(normed, inverse, weight, cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:       # type: ignore[override]
        normed, inverse, weight, cos, sin = ctx.saved_tensors
        width = grad.size(-1)
        back = torch.empty_like(grad)
        rotate(grad, cos, -sin, width // 2, back)                            # the inverse rotation
        if weight is None:
            return back, None, None, None, None
        grad_weight = (back * normed).sum((0, 1), dtype=torch.float32).to(weight.dtype)
        back *= weight
        dot = torch.linalg.vecdot(back, normed).unsqueeze_(-1).div_(-width)
        back.addcmul_(normed, dot).mul_(inverse)
        return back, grad_weight, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int, out: Tensor) -> None:
    """Rotate the halves of x [t, g, r + 1, d] into out."""
    cos, sin = cos[:, None, None, :], sin[:, None, None, :]
    torch.mul(x[..., :half], cos, out=out[..., :half])
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    torch.mul(x[..., half:], cos, out=out[..., half:])
    out[..., half:].addcmul_(x[..., :half], sin)
