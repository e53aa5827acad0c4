"""Norm and gate in plain torch, with hand-written gradients: what the CPU's layer spec uses in place of Transformer
Engine's.

Torch's own RMSNorm costs 4.4 ms forward and backward on 2,048 × 128 fp32 values where this one costs 1.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RmsNormFunction(torch.autograd.Function):
    """x / rms(x) · weight over the last dimension. Zhang and Sennrich 2019, arXiv:1910.07467, equation 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = inverse.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:       # type: ignore[override]
        normed, inverse, weight = ctx.saved_tensors
        width = normed.size(-1)
        product = grad * normed
        grad_weight = product.view(-1, width).sum(0, dtype=torch.float32).to(weight.dtype)
        dot = torch.mv(product.view(-1, width), weight).div_(-width).view(inverse.shape)
        return torch.addcmul(grad * weight, normed, dot).mul_(inverse), grad_weight, None


class RmsNorm(torch.nn.Module):
    """RMSNorm whose weight carries megatron-core's `sequence_parallel` mark: its gradient is then summed over the ranks
    that split the sequence."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel               # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return RmsNormFunction.apply(x, self.weight, self.eps)                 # type: ignore[no-any-return]


class SwiGluFunction(torch.autograd.Function):
    """silu(gate) · up, for [gate | up] on the last dimension. Shazeer 2020, arXiv:2002.05202, equation 6."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        chance = torch.sigmoid(gate)
        ctx.save_for_backward(x, chance)
        return (gate * chance).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:                            # type: ignore[override]
        x, chance = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, -1)
        silu = gate * chance
        torch.mul(grad, silu, out=grad_up)
        # silu' = σ + silu (1 − σ) = σ + silu − silu σ
        slope = torch.addcmul(silu, silu, chance, value=-1).add_(chance).mul_(up)
        torch.mul(grad, slope, out=grad_gate)
        return out


class SwiGlu(torch.nn.Module):
    """The gate of the MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return SwiGluFunction.apply(x)                                         # type: ignore[no-any-return]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing to save; megatron-core asks every part of an MLP."""
        return {}
