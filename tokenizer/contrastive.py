"""Contrastive loss between pictures and texts over the batches of all ranks, and the text tower for it.

Loss and gradients are made together on the way forward: both have closed forms in the logits, so no logit is kept, and no rank waits for
another in the backward pass, where two losses that exchange features in different orders would lock up. The sigmoid loss needs no
normalizer over all texts: texts travel from rank to rank in a ring, each with the gradient that it has gathered so far, and are home after
one round. The softmax loss gathers all features first.

Letters: R ranks, b pairs of one rank, B = R · b, d width, t ids of a text.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from tokenizer import clip_halves
from tokenizer.ranks import grouped, rank, sum_over_ranks
from tokenizer.semantic import TowerConfig, padded
from tokenizer.tower_source import parse

Kind = Literal["sigmoid", "softmax"]
MAX_SCALE = math.log(100)
"""Logits are at most 100 × a cosine (Radford et al. 2021, arXiv:2103.00020, section 2.5)."""
TILE = 1 << 24
"""Logits of the sigmoid loss that exist at once: 64 MiB."""


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, kind: Kind = "sigmoid") -> Tensor:
    """image [b, d], text [b, d] of unit length, row i a pair; scale (the logarithm of what cosines are multiplied by) and bias are
    scalars → this rank's share. Its mean over the ranks, and the mean of its gradients, are the joined batch's.

    All ranks bring the same b and weigh the loss alike: a text's gradient comes home with the other ranks' terms in it."""
    if image.shape != text.shape:
        raise ValueError(f"pictures are embedded as {list(image.shape)}, texts as {list(text.shape)}: give both towers one embed_dim and "
                         "each picture one text")
    if kind not in ("sigmoid", "softmax"):
        raise ValueError(f"a contrastive loss is sigmoid or softmax, not {kind!r}")
    with torch.autocast(image.device.type, enabled=False):
        dtype = torch.promote_types(image.dtype, torch.float32)
        factor = scale.to(dtype).clamp(max=MAX_SCALE).exp()
        offset = torch.zeros_like(factor) if bias is None else bias.to(dtype)
        return cast(Tensor, _Pairs.apply(image.to(dtype), text.to(dtype), factor, offset, kind))


class Contrastive(nn.Module):
    """The loss with its learned scale and bias, which start where the papers start them."""

    def __init__(self, kind: Kind = "sigmoid") -> None:
        super().__init__()
        self.kind: Kind = kind
        self.scale = nn.Parameter(torch.tensor(math.log(10 if kind == "sigmoid" else 1 / 0.07)))
        # at first nearly all pairs are no pairs (section 3.2 of SigLIP)
        self.bias = nn.Parameter(torch.tensor(-10.0)) if kind == "sigmoid" else None

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """[b, d], [b, d] of any length → this rank's share of the loss."""
        return contrastive_loss(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), self.scale, self.bias, self.kind)


class _Pairs(torch.autograd.Function):
    """A scalar whose gradients are known once it is."""

    @staticmethod
    def forward(ctx: FunctionCtx, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, kind: Kind) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss, *grads = _sigmoid(image, text, scale, bias) if kind == "sigmoid" else _softmax(image, text, scale)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*(grad * own for own in ctx.saved_tensors), None)


def _sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """SigLIP (Zhai et al. 2023, arXiv:2303.15343, section 3.2 and algorithm 1): with z = scale · x·y + bias, a sum over all pairs of
    softplus(z), less z where they belong together; divided by b. → loss, gradients by image, text, scale and bias.

    dz is sigmoid(z), less 1 where they belong together."""
    b, ranks = len(image), dist.get_world_size() if grouped() else 1
    loss, by_scale, by_bias = (torch.zeros_like(scale) for _ in range(3))
    by_image, travelling = torch.zeros_like(image), torch.stack([text, torch.zeros_like(text)])  # [2, b, d]
    for hop in range(ranks):
        for rows in torch.arange(b, device=image.device).split(max(1, TILE // b)):
            texts = travelling[0, rows]
            cosines = image @ texts.T  # [b, rows]
            z = scale * cosines + bias
            dz = z.sigmoid()
            loss -= F.logsigmoid(-z).sum()
            if hop == 0:  # our own texts
                loss -= z[rows, rows - rows[0]].sum()
                dz[rows, rows - rows[0]] -= 1
            by_image.addmm_(dz, texts)
            travelling[1, rows] += dz.T @ image
            by_scale += (dz * cosines).sum()
            by_bias += dz.sum()
        if ranks > 1:
            travelling = _passed_on(travelling)
    return loss / b, by_image * scale / b, travelling[1] * scale / b, by_scale / b, by_bias / b


def _passed_on(mine: Tensor) -> Tensor:
    """To the next rank of the ring; → the previous one's."""
    theirs, ranks = torch.empty_like(mine), dist.get_world_size()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, (rank() + 1) % ranks),
                                        dist.P2POp(dist.irecv, theirs, (rank() - 1) % ranks)]):
        work.wait()
    return theirs


def _softmax(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3): mean cross-entropy of each picture among all texts and each text among all
    pictures. → loss, gradients by image, text, scale and bias; a bias changes nothing here."""
    b = len(image)
    first = rank() * b
    own = torch.arange(b, device=image.device)
    everyone = _gathered(torch.stack([image, text], 1))  # [B, 2, d]
    loss, by_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    by_all, by_own = torch.zeros_like(everyone), torch.zeros_like(everyone[:b])
    for side, mine in enumerate((image, text)):
        others = everyone[:, 1 - side]
        cosines = mine @ others.T  # [b, B]
        log_p = F.log_softmax(scale * cosines, -1)
        loss -= log_p[own, own + first].sum()
        dz = log_p.exp()
        dz[own, own + first] -= 1
        by_own[:, side] += dz @ others
        by_all[:, 1 - side] += dz.T @ mine
        by_scale += (dz * cosines).sum()
    grads = (by_own + sum_over_ranks(by_all)[first:first + b]) * scale / (2 * b)
    return loss / (2 * b), grads[:, 0], grads[:, 1], by_scale / (2 * b), torch.zeros_like(scale)


def _gathered(x: Tensor) -> Tensor:
    """[b, …] → [B, …] in rank order."""
    if not grouped():
        return x
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


class TextTower(nn.Module):
    """A text tower of open_clip with the way from words to its ids."""

    def __init__(self, model: nn.Module, width: int, tokenize: Callable[[Sequence[str]], Tensor]) -> None:
        super().__init__()
        self.model, self.width, self.tokenize = model, width, tokenize

    @classmethod
    def load(cls, text: str) -> "TextTower":
        """text: `open_clip:NAME:WEIGHTS`, see `tokenizer.tower_source`. Trainable."""
        source = parse(text)
        if source.library != "open_clip":
            raise ValueError(f"{text!r} is no text tower: they are read as open_clip:NAME:WEIGHTS")
        half = clip_halves.load(source, "text")
        return cls(half.tower, half.embed_dim, clip_halves.tokenizer(source, half.config))

    @classmethod
    def small(cls, config: TowerConfig, text_size: int, encode: Callable[[str], list[int]]) -> "TextTower":
        """An untrained one over pieces of our own, T = `text_size`; sizes as in `tokenizer.semantic.Teacher`."""
        half = {"context_length": config.context_len, "vocab_size": text_size + 1, "width": config.width, "heads": config.heads,
                "layers": config.text_layers}
        return cls(clip_halves.build(config.embed_dim, {"text_cfg": half}), config.embed_dim,
                   lambda texts: padded([encode(text) for text in texts], config.context_len, end=text_size))

    def forward(self, ids: Tensor) -> Tensor:
        """[b, t], as `tokenize` gives them → [b, d]."""
        return self.model(ids)
