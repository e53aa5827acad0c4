"""The visual tokenizer: pictures ↔ codes.

    pictures [b, 3, H, W] ─ semantic tower ─ linear ─┐
                          └ patches ─ closed form ───┴ quantizer ─ codes [b, M, gh, gw]
    codes ─ entries ─ pixel decoder (sees both parts) ─ pictures
                    └ semantic decoder ─ the teacher's features (training only)

Encoding is fp32 whatever surrounds it: two entries that lie close must not change places with the precision.

Letters: b batch, H W picture, gh gw code grid, M books, c tower width, ds dp dims of a book.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.layers import LinearPatches, PalettePatches, PixelDecoder
from tokenizer.quantize import QuantizerConfig, SharedIndexQuantizer
from tokenizer.semantic import TowerConfig, vision_tower


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes of a visual tokenizer."""

    tower: TowerConfig = field(default_factory=TowerConfig)
    """Semantic tower; its picture and patch size are the tokenizer's."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    patches: Literal["palette", "linear"] = "palette"
    """Latents of a patch: two colours and a pattern (two books), or principal components (any number of books)."""
    channels: int = 16
    """Hidden channels of the pixel decoder's convolutions."""
    blocks: int = 1
    """Residual convolutions of the pixel decoder."""

    def __post_init__(self) -> None:
        if self.tower.image_size % self.tower.patch_size:
            raise ValueError(f"pictures of {self.tower.image_size} px do not divide into patches of "
                             f"{self.tower.patch_size} px: change tower.image_size or tower.patch_size")
        if self.patches == "palette" and self.quantizer.pixel_dims != (6, self.tower.patch_size**2):
            raise ValueError(f"palette patches of {self.tower.patch_size} px have books of "
                             f"{(6, self.tower.patch_size**2)} dims, quantizer.pixel_dims says {self.quantizer.pixel_dims}")


class Losses(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    images: Tensor
    """[b, 3, H, W] reconstruction"""
    codes: Tensor
    """[b · gh · gw, M]"""


class VisualTokenizer(nn.Module):
    """Encodes, decodes, and gives its training losses. Filled by training or `load`."""

    fingerprint: str = "untrained"
    """Names weights and configuration, once saved or loaded; 16 hex digits."""

    def __init__(self, config: TokenizerConfig, text: Tensor, pieces: Tensor) -> None:
        """text [V, D], pieces [V]: token embeddings that the semantic table is made of, and whose they are."""
        super().__init__()
        self.config = config
        tower, q = config.tower, config.quantizer
        self.semantic_tower = vision_tower(tower).requires_grad_(False)
        self.semantic_in = nn.Linear(tower.width, q.num_books * q.semantic_dim)
        self.patches = (PalettePatches(tower.patch_size) if config.patches == "palette"
                        else LinearPatches(tower.patch_size, q.pixel_dims))
        self.quantizer = SharedIndexQuantizer(q, text, pieces)
        self.semantic_out = nn.Sequential(nn.Linear(q.num_books * q.semantic_dim, tower.width), nn.GELU(),
                                          nn.Linear(tower.width, tower.width))
        self.pixel_out = PixelDecoder(tower.patch_size, q.num_books * q.semantic_dim, config.channels, config.blocks)

    @property
    def image_size(self) -> int:
        return self.config.tower.image_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.tower.image_size // self.config.tower.patch_size
        return side, side

    @property
    def codebook_size(self) -> int:
        return self.config.quantizer.codebook_size

    @property
    def num_books(self) -> int:
        return self.config.quantizer.num_books

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Patch features of the frozen tower: [b, 3, H, W] → [b · gh · gw, c]."""
        return self.semantic_tower(images)[1].flatten(0, 1)

    def latents(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """→ semantic [b · gh · gw, M · ds], pixel [b · gh · gw, Σ dp]."""
        return self.semantic_in(features), self.patches(images)

    def render(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """Entries [b · gh · gw, M · ds], [b · gh · gw, Σ dp] → pictures [b, 3, H, W]."""
        return self.pixel_out(self.patches.decode(pixel, self.grid), self._grid(semantic))

    def _grid(self, x: Tensor) -> Tensor:
        """[b · gh · gw, d] → [b, d, gh, gw]"""
        return x.view(-1, *self.grid, x.shape[-1]).permute(0, 3, 1, 2)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1] → codes int32 [b, M, gh, gw]."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"pictures are {tuple(images.shape[-2:])}, this tokenizer takes "
                             f"{self.image_size}x{self.image_size} px: resize them with data.images.fit")
        with torch.autocast(images.device.type, enabled=False):
            codes = self.quantizer.encode(*self.latents(images.float(), self.features(images.float())))
        return self._grid(codes).to(torch.int32)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [b, M, gh, gw] → pictures [b, 3, H, W], about [-1, 1]."""
        semantic, pixel = self.quantizer.decode(codes.long().permute(0, 2, 3, 1).reshape(-1, self.num_books))
        return self.render(semantic, pixel)

    def forward(self, images: Tensor, semantic_weight: float = 0.1) -> Losses:
        """Training losses. Pixels: 0.2 L1 + L2; features: 1 − cosine to the tower's, as VQ-KD (Peng et al. 2022,
        arXiv:2208.06366, equation 2)."""
        features = self.features(images)
        q = self.quantizer(*self.latents(images, features))
        out = self.render(q.semantic, q.pixel)
        terms = {"l1": F.l1_loss(out, images), "l2": F.mse_loss(out, images), "quantize": q.loss,
                 "semantic": 1 - F.cosine_similarity(self.semantic_out(q.semantic), features, dim=-1).mean()}
        total = 0.2 * terms["l1"] + terms["l2"] + terms["quantize"] + semantic_weight * terms["semantic"]
        return Losses(total, terms, out, q.codes)

    def code_vectors(self) -> list[Tensor]:
        """Book by book [K, ds + dp]: what each code stands for, in the space where codes are compared."""
        q = self.quantizer
        return [q.joint(q.semantic_table(m), q.pixel_tables[m]).detach() for m in range(self.num_books)]

    # On disk ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = safetensors.torch.save({k: v.contiguous() for k, v in self.state_dict().items()})
        settings = json.dumps({**asdict(self.config), "text_shape": list(self.quantizer.text.shape)}, indent=1) + "\n"
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_text(settings)
        self.fingerprint = _fingerprint(settings, weights)

    @classmethod
    def load(cls, folder: Path) -> "VisualTokenizer":
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no visual tokenizer: it has no {name}. "
                                        "Name a folder that `mmllm tokenizer train` wrote")
        settings, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
        fields = json.loads(settings)
        text_shape, tower, quantizer = (fields.pop(name) for name in ("text_shape", "tower", "quantizer"))
        quantizer["pixel_dims"] = tuple(quantizer["pixel_dims"])
        config = TokenizerConfig(tower=TowerConfig(**tower), quantizer=QuantizerConfig(**quantizer), **fields)
        model = cls(config, torch.zeros(text_shape), torch.zeros(text_shape[0], dtype=torch.long))
        model.load_state_dict(safetensors.torch.load(weights))
        model.fingerprint = _fingerprint(settings, weights)
        return model.eval().requires_grad_(False)


def _fingerprint(settings: str, weights: bytes) -> str:
    return hashlib.sha256(settings.encode() + weights).hexdigest()[:16]
