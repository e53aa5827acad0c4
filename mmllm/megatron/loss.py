"""From the last hidden state to the loss, over a vocabulary that tensor-parallel ranks split.

Two distinctions. *Sums, not means*: every number here is a weighted sum over tokens, and what it is divided by is the
weight of the whole global batch, so that any split into ranks and micro-batches gives the same step. *Only tokens that
are trained on*: the output layer is two fifths of a small model's arithmetic, and prompts, padding and document ends
never reach it.

The output layer and the cross-entropy are one function that never holds more than a chunk of logits: its gradient is
computed in the forward pass, where softmax is at hand, as Liger Kernel does (arXiv:2410.10989, section 3.2).

Letters: t tokens of a micro-batch, m of them trained on, h hidden size, v vocabulary columns of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Logits held at once: a CPU's share of cache, a GPU's launch overhead."""


@dataclass(frozen=True)
class Targets:
    """What a micro-batch is trained on, in the order of its tokens."""

    where: Tensor
    """[m] tokens whose prediction counts."""
    labels: Tensor
    """[m] ids they should predict."""
    weight: Tensor
    """[m] fp32; sums to at most 1 over the global batch: already divided by the batch's whole weight."""
    image: Tensor
    """[m] bool: the label is an image token."""
    counted: Tensor
    """[m] fp32 the weight that the data gave, before modality weights: what the reported means are over."""
    z_loss: float
    padding: Tensor | None = None
    """[1, t] bool, where there are experts: tokens that their balance does not count."""
    balance_tokens: float = 1.0
    """Tokens of the whole global batch that it does count."""


class HeadLoss(torch.autograd.Function):
    """Σ weight (nll + z log²Z), with nll and log Z of each token for the log.

    hidden [m, h], output weight [v, h] of which the first `columns` are real, → loss [], nll [m], log Z [m] (no
    gradient)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, z_loss: float,
                first: int, columns: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        real = weight[:columns]                                               # rows of padding never enter the softmax
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        nll, log_z = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        rows = max(64, CHUNK_BYTES[hidden.device.type] // (4 * max(1, columns)))
        for start in range(0, len(hidden), rows):
            part = slice(start, min(start + rows, len(hidden)))
            logits = (hidden[part] @ real.t()).float()                        # [m', v]
            local = labels[part] - first
            elsewhere = (local < 0) | (local >= columns)
            local = local.masked_fill(elsewhere, 0)[:, None]
            hit = logits.gather(1, local).squeeze(1)
            top = logits.amax(-1)
            chance = torch.softmax(logits, -1)                                # over this rank's columns
            local_z = top - chance.amax(-1).log_()                            # the likeliest has chance exp(top) / Z
            z = local_z
            if group is not None:
                top = local_z.clone()
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
                both = torch.stack([hit.masked_fill(elsewhere, 0.0), (local_z - top).exp_()])
                dist.all_reduce(both, group=group)
                hit, z = both[0], both[1].log() + top
            nll[part], log_z[part] = z - hit, z
            # d/dlogits of w (nll + c log²Z) = w (1 + 2 c log Z) softmax − w onehot
            scale = token_weight[part] * (1 + 2 * z_loss * z)
            chance *= (scale if group is None else scale * (local_z - z).exp())[:, None]
            chance.scatter_add_(1, local, -token_weight[part].masked_fill(elsewhere, 0.0)[:, None])
            grad = chance.to(hidden.dtype)
            torch.mm(grad, real, out=grad_hidden[part])
            grad_weight[:columns].addmm_(grad.t(), hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll, log_z)
        return (token_weight * (nll + z_loss * log_z.square())).sum(), nll, log_z

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:      # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # one pass over the weight saved where asking is free
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
            grad_weight = grad_weight * grad_loss.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


STATISTICS = ("loss", "text", "text_weight", "image", "image_weight", "z")
"""Names of the sums that a micro-batch reports, in order."""


def statistics(loss: Tensor, nll: Tensor, log_z: Tensor, targets: Targets) -> Tensor:
    """The sums behind the log line, [6] fp32 in the order of STATISTICS: add them over micro-batches and ranks, then
    `means`."""
    image = targets.counted * targets.image
    text = targets.counted - image
    return torch.stack([loss.detach(), (text * nll).sum(), text.sum(), (image * nll).sum(), image.sum(),
                        (targets.counted * log_z.square()).sum()])


def means(sums: list[float]) -> dict[str, float]:
    """Summed statistics → loss (as optimized) and the mean nll of each modality in nats; log²Z under "z"."""
    named: dict[str, float] = dict(zip(STATISTICS, sums, strict=True))
    weight = named["text_weight"] + named["image_weight"]
    out = {"loss": named["loss"]}
    for name in ("text", "image"):
        if named[f"{name}_weight"] > 0:
            out[f"loss/{name}"] = named[name] / named[f"{name}_weight"]
    out["z"] = named["z"] / max(weight, 1e-9)
    return out
