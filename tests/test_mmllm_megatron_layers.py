"""The hand-written layers equal torch's, forward and backward."""

import torch
import torch.nn.functional as F

from mmllm.megatron.layers import RmsNormFunction, SwiGluFunction


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


def test_rms_norm_is_torchs() -> None:
    x, weight = torch.randn(6, 1, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    ours, theirs = RmsNormFunction.apply(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, x, weight), gradients(theirs, x, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    x = torch.randn(6, 1, 16, requires_grad=True)
    ours, theirs = SwiGluFunction.apply(x), F.silu(x[..., :8]) * x[..., 8:]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, x), gradients(theirs, x))
