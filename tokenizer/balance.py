"""Weights of losses by the strength of their gradients, found during warm-up and then frozen.

A contrastive loss and a reconstruction loss differ by two orders of magnitude in gradient, and so in how fast they are learned; no weight
set by hand holds for other data or sizes. QLIP (Zhao et al. 2025, arXiv:2502.05178, section 3.2) sets them from gradient magnitudes. Here:
every so many steps the norm of each loss's gradient at one place that all of them go through, the quantizer's output, is measured and
averaged; a loss then weighs ratio · |reference| / |its own|. Frozen weights make the rest of the run one fixed objective.

Letters: G losses, the reference first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from tokenizer.ranks import sum_over_ranks

LEAST, MOST = 1e-3, 1e3


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Which losses are balanced, and when."""

    reference: str = "reconstruction"
    """The loss whose weight stays 1."""
    ratios: Mapping[str, float] = field(default_factory=lambda: {"contrastive": 1.0, "semantic": 1.0})
    """r: each other loss by name, and its gradient's norm as a multiple of the reference's."""
    every: int = 100
    """Steps between two measurements. Each costs a backward pass a loss, down to the quantizer's output."""
    warmup_steps: int = 2_000
    """Steps after which the weights stay what they are."""
    decay: float = 0.9
    """Of the moving average of norms, a measurement."""

    def __post_init__(self) -> None:
        if self.reference in self.ratios:
            raise ValueError(f"loss {self.reference} is balanced against itself: take it out of balance.ratios")
        if self.every < 1:
            raise ValueError(f"balance.every is {self.every}: measure every 1 step or more")


class Balance(nn.Module):
    """Joins losses into one. Its buffers are part of a checkpoint, and the same on all ranks."""

    norms: Tensor
    """[G] float64 moving averages of gradient norms; 0 before the first measurement"""
    ratios: Tensor
    """[G] float64"""

    def __init__(self, config: BalanceConfig) -> None:
        super().__init__()
        self.config = config
        self.names = (config.reference, *config.ratios)
        self.register_buffer("norms", torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("ratios", torch.tensor((1.0, *config.ratios.values()), dtype=torch.float64), persistent=False)

    def forward(self, losses: Mapping[str, Tensor], at: Sequence[Tensor], step: int) -> Tensor:
        """→ the weighted sum of the losses, observed before."""
        self.observe(losses, at, step)
        return torch.stack([losses[name].float() for name in self.names]) @ self.weight().float()

    def observe(self, losses: Mapping[str, Tensor], at: Sequence[Tensor], step: int) -> None:
        """losses: scalars by name. at: the tensors that all of them are functions of. When `step` is due, on every rank alike, their norms
        are taken into the average."""
        if set(losses) != set(self.names):
            raise ValueError(f"balanced are the losses {', '.join(self.names)}, given were {', '.join(losses)}: "
                             "name the same ones in balance.ratios")
        if not self.training or step >= self.config.warmup_steps or step % self.config.every:
            return
        now = torch.stack([self._square(name, losses[name], at) for name in self.names])
        now = sum_over_ranks(now).sqrt()  # of the joined batch, up to a factor that all losses share
        # a loss that is switched off has no gradient, one that overflowed no norm: neither says anything
        sound = now.isfinite() & (now > 0)
        self.norms.copy_(torch.where(sound & (self.norms > 0), self.norms.lerp(now, 1 - self.config.decay),
                                     torch.where(sound, now, self.norms)))

    def _square(self, name: str, loss: Tensor, at: Sequence[Tensor]) -> Tensor:
        if not loss.requires_grad:
            return self.norms.new_zeros(())
        every = cast("tuple[Tensor | None, ...]", torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True))
        grads = [g for g in every if g is not None]
        if not grads:
            raise ValueError(f"loss {name} is no function of the quantizer's output: it cannot be balanced, take it out of balance.ratios")
        return torch.stack([g.double().square().sum() for g in grads]).sum().to(self.norms.device)

    def weight(self) -> Tensor:
        """[G] float64: r · |reference| / |own|, 1 where either was never measured."""
        raw = self.ratios * self.norms[0] / self.norms
        known = (self.norms > 0) & (self.norms[0] > 0)
        return torch.where(known, raw.clamp(LEAST, MOST), 1.0)

    def weights(self) -> dict[str, float]:
        """For the log."""
        return dict(zip(self.names, self.weight().tolist(), strict=True))
