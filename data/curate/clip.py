"""An open_clip model that compares pictures with texts, and a head that says how much people would like a picture.

Letters: p pictures, t texts, d width of the space that both share, S side of the square picture.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data.images import to_tensor
from tokenizer import clip_halves
from tokenizer.contrastive import TextTower
from tokenizer.tower_source import parse, read_weights

LAION_LAYERS = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in LAION's list of layers; between them lies dropout, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Both towers, frozen."""

    vision: nn.Module
    text: TextTower
    width: int
    """d"""
    image_size: int
    """S"""
    scale: Tensor
    """[3, 1, 1] with `shift`: pixels in [-1, 1] → as the tower was trained with them"""
    shift: Tensor

    @classmethod
    def load(cls, name: str, device: torch.device) -> "Clip":
        """name: `open_clip:NAME:WEIGHTS`, see `tokenizer.tower_source`. Errors: ValueError, FileNotFoundError."""
        text = TextTower.load(name).eval().requires_grad_(False)
        half = clip_halves.load(parse(name), "vision")
        side: int | Sequence[int] = half.config.get("image_size", 224)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in half.statistics)
        return cls(vision=half.tower.eval().requires_grad_(False).to(device), text=text.to(device), width=half.embed_dim,
                   image_size=side if isinstance(side, int) else max(side), scale=(0.5 / std).to(device),
                   shift=((0.5 - mean) / std).to(device))

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[NDArray[np.uint8]], batch_len: int) -> Tensor:
        """p × [S, S, 3] → unit vectors [p, d], on the CPU."""
        out = [self.vision(to_tensor(np.stack(pictures[i:i + batch_len]), self.scale.device) * self.scale + self.shift)
               for i in range(0, len(pictures), batch_len)]
        return F.normalize(torch.cat(out), dim=-1).cpu() if out else torch.zeros(0, self.width)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_len: int) -> Tensor:
        """→ unit vectors [t, d], on the CPU. What lies beyond the tower's context, 77 ids for CLIP's, is not read."""
        out = [self.text(self.text.tokenize(texts[i:i + batch_len]).to(self.scale.device)) for i in range(0, len(texts), batch_len)]
        return F.normalize(torch.cat(out), dim=-1).cpu() if out else torch.zeros(0, self.width)


class Aesthetic(nn.Module):
    """Linear layers from the embedding of a picture to one number, about 1 to 10: LAION's two predictors, or one of one's own.

        weight [1, d], bias [1]                      LAION-AI/aesthetic-predictor, for open_clip's ViT-L-14, -B-16 and -B-32
        layers.N.weight, layers.N.bias; N = 0 2 4 6 7   christophschuhmann/improved-aesthetic-predictor, for ViT-L-14: d → 1024 → 128 → 64
                                                     → 16 → 1, without activations

    Both read unit vectors of OpenAI's weights. A file of other layers may mean activations that it does not tell of, and is refused."""

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.width = weights[0][0].shape[1]
        self.linear = nn.ModuleList()
        for weight, bias in weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
            self.linear.append(layer)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Aesthetic":
        """Errors: ValueError for other tensors than those above, FileNotFoundError."""
        if not path.is_file():
            raise FileNotFoundError(f"there is no aesthetic head {path}")
        found = read_weights(path)
        names = {int(match[1]): match[0] for name in found if (match := re.fullmatch(r"layers\.(\d+)\.", name.removesuffix("weight")))}
        prefixes = [""] if set(found) == {"weight", "bias"} else [names[n] for n in sorted(names)]
        wanted = {prefix + kind for prefix in prefixes for kind in ("weight", "bias")}
        if set(found) != wanted or (prefixes != [""] and tuple(sorted(names)) != LAION_LAYERS):
            raise ValueError(f"{path} is no aesthetic head: it holds {', '.join(sorted(found)[:4])}, …, and not weight and bias, or "
                             f"layers.N.weight and layers.N.bias for N = {', '.join(map(str, LAION_LAYERS))}")
        weights = [(found[f"{prefix}weight"], found[f"{prefix}bias"]) for prefix in prefixes]
        shapes = [tuple(weight.shape) for weight, _ in weights]
        if any(one[0] != other[1] for one, other in pairwise(shapes)) or shapes[-1][0] != 1:
            raise ValueError(f"{path} is no aesthetic head: its layers have shapes {shapes}, which do not lead to one number")
        return cls(weights).eval().requires_grad_(False).to(device)

    def forward(self, embedding: Tensor) -> Tensor:
        """unit vectors [p, d] → [p]"""
        x = embedding.to(cast(Any, self.linear[0]).weight.device)
        for layer in self.linear:
            x = layer(x)
        return x[:, 0]
