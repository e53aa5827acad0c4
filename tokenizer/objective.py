"""What the visual tokenizer is trained for: pictures rebuilt, a teacher's features kept, captions told apart.

    L = λ1 L1 + λ2 L2 + λp perceptual + λq quantize + λe entropy + λs (1 − cos to the teacher) + λc contrastive    (+ adversarial)

Letters: b batch, gh gw grid, c teacher width, d width of the space that pictures and texts share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.contrastive import Contrastive, TextTower
from tokenizer.distillation import distillation_loss
from tokenizer.model import Reading, VisualTokenizer, tower_features


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of the terms of the loss; a term of weight 0 is not computed."""

    l1: float = 0.2
    """Mean absolute difference of pixels in [-1, 1]."""
    l2: float = 1.0
    """Mean squared difference."""
    perceptual: float = 0.0
    """LPIPS, or what the recipe puts in its place."""
    quantize: float = 1.0
    """Entries to latents, and latents to entries."""
    entropy: float = 0.0
    """Sure choices, all codes in use (quantizer.entropy_latents)."""
    semantic: float = 0.1
    """1 − cosine of the semantic decoder's features to the teacher's."""
    contrastive: float = 0.0
    """Codes of a picture to its caption, against other captions."""


class Terms(NamedTuple):
    losses: dict[str, Tensor]
    """Each term, unweighted"""
    reading: Reading


class Objective(nn.Module):
    """A tokenizer with what its losses need; called as one module, so that DDP and FSDP see all that is trained."""

    def __init__(self, tokenizer: VisualTokenizer, teacher: nn.Module | None = None, contrast: "CodeContrast | None" = None,
                 perceptual: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        """teacher: frozen, [b, 3, H, W] → (pooled, [b, gh · gw, c]); None distils from the tokenizer's own tower. perceptual: [b, 3, H, W]
        twice → [b]."""
        super().__init__()
        self.tokenizer, self.contrast = tokenizer, contrast
        self.frozen = [teacher, perceptual]  # in a list: no part of the state, nothing to shard or average

    def forward(self, images: Tensor, weights: Weights, texts: Tensor | None = None, scale: int = 1,
                perturb: Callable[[Tensor], Tensor] | None = None) -> Terms:
        """images [b, 3, H, W], texts ids [b, context]; a term of weight 0 is not computed."""
        teacher, perceptual = self.frozen
        reading: Reading = self.tokenizer(images, scale, perturb)
        rebuilt = reading.images.float()
        losses = {"l1": F.l1_loss(rebuilt, images), "l2": F.mse_loss(rebuilt, images), **reading.losses}
        if weights.perceptual and perceptual is not None:
            losses["perceptual"] = perceptual(rebuilt, images).mean()
        if weights.semantic:
            fine = images.shape[-2] // self.tokenizer.patch_size, images.shape[-1] // self.tokenizer.patch_size
            with torch.no_grad():
                features = reading.features if teacher is None else tower_features(cast(nn.Module, teacher), images, fine)
            losses["semantic"] = distillation_loss(reading.semantic, features, (reading.codes.shape[-2], reading.codes.shape[-1]), fine)
        if weights.contrastive and self.contrast is not None and texts is not None:
            semantic = self.tokenizer.quantizer.parts(reading.entries)[0]
            losses["contrastive"] = self.contrast(semantic.view(len(images), -1, self.contrast.dims), texts)
        return Terms(losses, reading)


class CodeContrast(nn.Module):
    """Codes against captions: the mean of a picture's semantic entries, through a norm and a linear map, beside the text tower's
    embedding (UniTok, Ma et al. 2025, arXiv:2502.20321, section 3.1)."""

    def __init__(self, dims: int, text: TextTower, kind: Literal["sigmoid", "softmax"] = "sigmoid") -> None:
        super().__init__()
        self.dims, self.text = dims, text
        self.head = nn.Sequential(nn.LayerNorm(dims), nn.Linear(dims, text.width))
        self.loss = Contrastive(kind)

    def embed(self, entries: Tensor) -> Tensor:
        """[b, n, dims] → [b, d]."""
        return self.head(entries.mean(1))

    def forward(self, entries: Tensor, texts: Tensor) -> Tensor:
        return self.loss(self.embed(entries), self.text(texts))
