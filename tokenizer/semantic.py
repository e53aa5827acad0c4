"""The semantic branch: a CLIP model built with open_clip, trained on the same shards or loaded from a path.

Its vision tower gives the features that codes are distilled from, its text tower the token embeddings that the semantic
table is made of. Contrastive loss alone learns little in a minute on two cores, so a classification loss over
the caption's tokens is added (SuperClass, Huang et al. 2024, arXiv:2411.03313, section 3.1).

Letters: b batch, t text ids, T text pieces, c tower width, gh gw patch grid.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Sizes of the CLIP model."""

    image_size: int = 32
    patch_size: int = 8
    width: int = 128
    """c: of both towers."""
    layers: int = 3
    heads: int = 4
    text_layers: int = 1
    embed_dim: int = 64
    """Of the space that pictures and texts share."""
    context_len: int = 20
    """Text ids read; the rest is cut."""


def vision_tower(config: TowerConfig) -> "VisionTransformer":
    """An open_clip vision tower whose forward gives (pooled [b, embed_dim], patch features [b, gh · gw, c])."""
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(image_size=config.image_size, patch_size=config.patch_size, width=config.width,
                             layers=config.layers, heads=config.heads, mlp_ratio=4.0, pool_type="avg",
                             output_dim=config.embed_dim, output_tokens=True)
    setattr(tower, "width", config.width)  # noqa: B010  a plain number, not a module
    return tower


class Teacher(nn.Module):
    """A small CLIP: vision tower, text tower over our text pieces, and a head that names the caption's pieces."""

    def __init__(self, config: TowerConfig, text_size: int) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.config, self.text_size = config, text_size
        self.visual = vision_tower(config)
        self.text = TextTransformer(context_length=config.context_len, vocab_size=text_size + 1, width=config.width,
                                    heads=config.heads, layers=config.text_layers, output_dim=config.embed_dim,
                                    pool_type="argmax")  # pools at the largest id, which ends a text
        self.words = nn.Linear(config.width, text_size)
        nn.init.constant_(self.words.bias, -math.log(text_size))  # most pieces are absent: not a thing to learn first
        self.logit_scale = nn.Parameter(torch.tensor(2.659))

    def text_batch(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Ragged ids → [b, context_len], ended with id T."""
        return padded(texts, self.config.context_len, self.text_size)

    def image_embedding(self, images: Tensor) -> Tensor:
        """[b, 3, H, W] → unit vectors [b, embed_dim]."""
        return F.normalize(self.visual(images)[0], dim=-1)

    def text_embedding(self, text: Tensor) -> Tensor:
        """[b, context_len] → unit vectors [b, embed_dim]."""
        return F.normalize(self.text(text), dim=-1)

    def forward(self, images: Tensor, text: Tensor, word_weight: float = 3.0) -> tuple[Tensor, dict[str, Tensor]]:
        """→ loss and its terms: contrastive over the batch (Radford et al. 2021, arXiv:2103.00020, figure 3), words."""
        pooled, tokens = self.visual(images)
        logits = F.normalize(pooled, dim=-1) @ self.text_embedding(text).T * self.logit_scale.clamp(max=4.605).exp()
        target = torch.arange(len(images), device=images.device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        present = torch.zeros(len(images), self.text_size + 1, device=images.device).scatter_(1, text, 1.0)
        present = present[:, 1:-1]  # neither filler nor end
        words = F.binary_cross_entropy_with_logits(self.words(tokens.mean(1))[:, 1:].float(), present,
                                                   reduction="none").sum(-1).mean()
        terms = {"contrastive": contrastive, "words": words}
        return contrastive + word_weight * words, terms

    def save(self, path: Path) -> None:
        """Write one safetensors file, sizes in its header."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), path, {"tower": json.dumps(asdict(self.config)), "text_size": str(self.text_size)})

    @classmethod
    def load(cls, path: Path) -> "Teacher":
        if not path.is_file():
            raise FileNotFoundError(f"there is no teacher {path}: `mmllm tokenizer train` writes one")
        with safe_open(path, "pt") as file:
            sizes = file.metadata()
            teacher = cls(TowerConfig(**json.loads(sizes["tower"])), int(sizes["text_size"]))
            teacher.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return teacher.eval().requires_grad_(False)


def padded(texts: Sequence[Sequence[int]], context_len: int, end: int) -> Tensor:
    """Ragged ids → [b, context_len]: cut, ended with id `end`, filled with 0 behind it."""
    out = torch.zeros(len(texts), context_len, dtype=torch.long)
    for row, ids in zip(out, texts, strict=True):
        ids = [*ids[:context_len - 1], end]
        row[:len(ids)] = torch.tensor(ids)
    return out


def recall_at_1(image: Tensor, text: Tensor) -> float:
    """Share of texts whose own picture is the nearest: [n, d], [n, d] unit vectors."""
    return ((text @ image.T).argmax(-1) == torch.arange(len(text), device=text.device)).float().mean().item()
