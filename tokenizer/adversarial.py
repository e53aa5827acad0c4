"""What the two sides of adversarial training pay, and how much of it the decoder hears.

A step: the decoder's loss is reconstruction + gan_weight · adaptive_weight · generator_hinge; then, on detached reconstructions
and with what the first backward left in the discriminator zeroed, the discriminator's is discriminator_hinge + λ · LeCam. Numbers
that steer (anchors, weights) are means over all ranks: each rank uses the same one, and it is the one that a single rank with
the whole batch would find.

Letters: b batch, n places that get a logit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.ranks import sum_over_ranks


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Logits [b, n] of pictures and of reconstructions → loss (Lim and Ye 2017, arXiv:1705.02894), halved as VQGAN and those after
    it do, so their weights for LeCam carry over."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def generator_hinge(fake: Tensor) -> Tensor:
    """Logits [b, n] of reconstructions → loss."""
    return -fake.float().mean()


class LeCam(nn.Module):
    """Holds the discriminator's answers near where the other side's were of late (Tseng et al. 2021, arXiv:2104.03310, equation 3):

        E (D(x) − α_fake)² + E (D(x̂) − α_real)²

    with α the moving averages of its answers. Peers square only what lies above or below; the paper squares all of it, as here.
    """

    anchors: Tensor
    """[2] α_real, α_fake"""
    updates: Tensor
    """How many batches they have seen; int64, in the state so that a resumed run goes on as if it had not stopped."""

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("anchors", torch.zeros(2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits [b, n] of pictures and of reconstructions → loss; in training the anchors take them in first."""
        real, fake = real.float(), fake.float()
        if self.training:
            with torch.no_grad():
                now = _mean_over_ranks(torch.stack([real.mean(), fake.mean()]))
                self.updates += 1
                # a plain mean until there are enough for the decay: from zeros, 0.999 would take a thousand steps to arrive
                self.anchors.lerp_(now, (1 / self.updates).clamp_min(1 - self.decay))
        alpha_real, alpha_fake = self.anchors.clone()  # the next step moves them, maybe before this one's backward
        return (real - alpha_fake).square().mean() + (fake - alpha_real).square().mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, low: float = 0.015, high: float = 1e4, eps: float = 1e-6) -> Tensor:
    """ω = ‖g_rec‖ / (‖g_gen‖ + eps), in [low, high], of the two losses' gradients at the reconstructed pictures [b, 3, H, W]: both pull on
    the decoder equally. Esser et al. 2021 (arXiv:2012.09841, equation 7) take the gradients of the decoder's last weight; at the picture
    they are known before the decoder's backward pass, which then runs once for both, and mean the same when it is sharded."""
    squares = torch.stack([g.float().square().sum() for g in (reconstruction, generator)])
    rec, gen = sum_over_ranks(squares).sqrt()
    return (rec / (gen + eps)).clamp(low, high)


def gan_weight(step: int, start: int, warmup: int, peak: float) -> float:
    """0 before step `start`, then linearly up over `warmup` steps to `peak`. Above 0 exactly where adversarial training is on."""
    return peak * min(max(step - start + 1, 0) / (warmup + 1), 1.0)


def _mean_over_ranks(x: Tensor) -> Tensor:
    """Ranks hold equal batches, so the mean of their means is everybody's."""
    total = sum_over_ranks(torch.cat([x.flatten(), x.new_ones(1)]))  # the last counts the ranks
    return (total[:-1] / total[-1]).view_as(x)
