"""The visual tokenizer: pictures ↔ codes.

    pictures [b, 3, H, W] ─ semantic tower ─ projection ─┐
                          └ pixel branch ────────────────┴ quantizer ─ codes [b, M, gh, gw]
    codes ─ entries ─ pixel decoder (sees both parts) ─ pictures
                    └ semantic decoder ─ the teacher's features (training only)

One model serves several *scales*: at scale s the latents are averaged over s × s positions before they are quantized, which gives
s² times fewer codes (scale-adaptive pooling, TA-Tok, Han et al. 2025, arXiv:2506.18898, section 3.1). Encoding is fp32 whatever
surrounds it: two entries that lie close must not change places with the precision.

Letters: b batch, H W picture, gh gw code grid, M books, c tower width, n = b · gh · gw.
"""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tokenizer.clip_halves import positions
from tokenizer.grid import buckets
from tokenizer.layers import ClosedPixels, ConvPixels, LinearPatches, PalettePatches, VitPixels, from_grid, to_grid
from tokenizer.lookup_free import BinaryQuantizer, FsqQuantizer
from tokenizer.quantize import Quantizer, QuantizerConfig, SharedIndexQuantizer, TextEmbedding
from tokenizer.residual import ResidualQuantizer
from tokenizer.semantic import TowerConfig, vision_tower
from tokenizer.towers import Tower
from tokenizer.vit import GridTransformer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Parts and sizes of a visual tokenizer."""

    tower: TowerConfig = field(default_factory=TowerConfig)
    """Picture and patch size, and the semantic tower's sizes where it is our own."""
    tower_source: str = ""
    """A pretrained semantic tower, as tokenizer/towers.py names it; our own if empty."""
    train_tower: bool = False
    """The semantic tower learns too; else it stays as it is."""
    projection: Literal["linear", "mlp"] = "linear"
    """From tower features to semantic latents: linear, or linear-tanh-linear."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """Latents to codes."""
    pixel: Literal["palette", "linear", "conv", "vit"] = "palette"
    """Pixel branch: two colours and a pattern a patch (two books), principal components, convolutions, or a transformer."""
    channels: int = 16
    """Channels of the convolutions: of the refinement (palette, linear), at full resolution (conv)."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level over `channels` (conv); log2(patch) + 1 numbers."""
    blocks: int = 1
    """Residual blocks: of the refinement (palette, linear), of each level (conv)."""
    width: int = 256
    """Of the pixel transformers (vit)."""
    layers: int = 4
    """Of each of them."""
    heads: int = 4
    """Of each of them."""
    semantic_layers: int = 0
    """Transformer layers of the semantic decoder; 0 is a two-layer MLP on each position."""
    teacher_width: int = 0
    """Width of the features that the semantic decoder gives; the tower's own if 0."""
    scales: tuple[int, ...] = (1,)
    """Positions that are averaged in each direction: one model, a token count for each."""
    max_aspect: float = 1.0
    """Pictures keep their aspect up to this, in buckets of about one area; 1 takes squares alone."""
    detach_semantic: bool = False
    """The pixel decoder's gradient does not reach semantic entries."""

    def __post_init__(self) -> None:
        tower, q = self.tower, self.quantizer
        if tower.image_size % tower.patch_size:
            raise ValueError(f"pictures of {tower.image_size} px do not divide into patches of {tower.patch_size} px: "
                             "change tower.image_size or tower.patch_size")
        side = tower.image_size // tower.patch_size
        if not self.scales or any(scale < 1 or side % scale for scale in self.scales):
            raise ValueError(f"scales are {self.scales}: each must divide the {side} x {side} grid")
        if self.pixel in ("palette", "linear"):
            if q.kind != "shared" or self.scales != (1,):
                raise ValueError(f"{self.pixel} patches have a closed form for a shared quantizer at scale 1, not for {q.kind} at scales "
                                 f"{self.scales}: set pixel to conv or vit")
            if self.pixel == "palette" and q.pixel_dims != (6, tower.patch_size**2):
                raise ValueError(f"palette patches of {tower.patch_size} px have books of {(6, tower.patch_size**2)} dims, "
                                 f"quantizer.pixel_dims says {q.pixel_dims}")


    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of the pictures it takes."""
        return buckets(self.tower.image_size, self.tower.patch_size * max(self.scales), self.max_aspect)


def build_quantizer(config: QuantizerConfig, text: TextEmbedding | None) -> Quantizer:
    if config.kind == "shared":
        return SharedIndexQuantizer(config, text)
    return {"residual": ResidualQuantizer, "fsq": FsqQuantizer, "lfq": BinaryQuantizer, "bsq": BinaryQuantizer}[config.kind](config)


class Reading(NamedTuple):
    """What a training pass gives."""

    images: Tensor
    """[b, 3, H, W] reconstruction"""
    semantic: Tensor
    """[b, gh · gw, teacher width] what the semantic decoder makes of the codes"""
    entries: Tensor
    """[n, dims] the quantizer's output"""
    latents: Tensor
    """[n, dims] its input"""
    features: Tensor
    """[b, gh · gw, c] the tower's, at scale 1"""
    codes: Tensor
    """[b, M, gh, gw]"""
    losses: dict[str, Tensor]
    """Of the quantizer."""


class VisualTokenizer(nn.Module):
    """Encodes, decodes, and reads for training. Filled by training or `load`."""

    fingerprint: str = "untrained"
    """Names weights and configuration, once saved or loaded; 16 hex digits."""

    def __init__(self, config: TokenizerConfig, text: TextEmbedding | None = None) -> None:
        """`text`: what a text table is made of."""
        super().__init__()
        self.config = config
        c, q, patch = config, config.quantizer, config.tower.patch_size
        self.semantic_tower = (Tower.load(c.tower_source) if c.tower_source else vision_tower(c.tower)).requires_grad_(c.train_tower)
        self.quantizer = build_quantizer(q, text)
        semantic, pixel = self.quantizer.part_dims
        self.tower_width: int = self.semantic_tower.width  # pyright: ignore[reportAttributeAccessIssue]
        tower_width = self.tower_width
        self.semantic_in = (nn.Linear(tower_width, semantic) if c.projection == "linear" else
                            nn.Sequential(nn.Linear(tower_width, tower_width), nn.Tanh(), nn.Linear(tower_width, semantic)))
        read = semantic + pixel if q.kind == "shared" else pixel
        match c.pixel:
            case "palette":
                self.pixel = ClosedPixels(PalettePatches(patch), semantic, c.channels, c.blocks)
            case "linear":
                self.pixel = ClosedPixels(LinearPatches(patch, q.pixel_dims), semantic, c.channels, c.blocks)
            case "conv":
                self.pixel = ConvPixels(patch, pixel, read, c.channels, c.multipliers, c.blocks)
            case "vit":
                self.pixel = VitPixels(patch, pixel, read, c.width, c.layers, c.heads)
        self.semantic_out = SemanticDecoder(semantic, tower_width, c.teacher_width or tower_width, c.semantic_layers)
        self.scale_embedding = nn.Parameter(torch.zeros(len(c.scales), read)) if len(c.scales) > 1 else None

    # Sizes ----------------------------------------------------------------------------------------------------------

    @property
    def image_size(self) -> int:
        return self.config.tower.image_size

    @property
    def patch_size(self) -> int:
        return self.config.tower.patch_size

    @property
    def scales(self) -> tuple[int, ...]:
        return self.config.scales

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of the pictures it takes."""
        return self.config.sizes

    @property
    def grid(self) -> tuple[int, int]:
        """Of a square picture at scale 1."""
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """All code grids, of every size at every scale."""
        return tuple(dict.fromkeys((h // self.patch_size // s, w // self.patch_size // s) for s in self.scales for h, w in self.sizes))

    @property
    def text(self) -> TextEmbedding | None:
        """What the semantic table is made of, if it is of text, without the rows."""
        return self.quantizer.text if isinstance(self.quantizer, SharedIndexQuantizer) else None

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def num_books(self) -> int:
        return self.quantizer.num_books

    # Pictures → codes → pictures ------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Position features of the tower: [b, 3, H, W] → [b · gh · gw, c] at scale 1."""
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        with torch.set_grad_enabled(self.config.train_tower and torch.is_grad_enabled()):
            return tower_features(self.semantic_tower, images, grid).flatten(0, 1)

    def frozen_tower(self) -> nn.Module:
        """The semantic tower as it is now, to be the teacher of the one that trains."""
        return copy.deepcopy(self.semantic_tower).eval().requires_grad_(False)

    def latents(self, images: Tensor, features: Tensor, scale: int = 1) -> Tensor:
        """pictures, their features at scale 1 → latents [n, dims] at a scale."""
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        semantic = self.semantic_in(from_grid(F.avg_pool2d(to_grid(features, grid), scale)) if scale > 1 else features)
        pixel = from_grid(F.avg_pool2d(self.pixel.encode(images), scale) if scale > 1 else self.pixel.encode(images))
        return torch.cat([semantic, pixel], -1) if self.config.quantizer.kind == "shared" else semantic + pixel

    def render(self, entries: Tensor, grid: tuple[int, int], scale: int = 1) -> Tensor:
        """Entries [n, dims] of a grid at a scale → pictures [b, 3, H, W]."""
        semantic, pixel = self.quantizer.parts(entries)
        if self.config.quantizer.kind != "shared":
            semantic = entries[:, :0]
        elif self.config.detach_semantic:
            semantic = semantic.detach()
        x = to_grid(torch.cat([semantic, pixel], -1), grid)
        if scale > 1:
            x = F.interpolate(x, scale_factor=float(scale), mode="bilinear")
        if self.scale_embedding is not None:
            x = x + self.scale_embedding[self.scales.index(scale)][:, None, None]
        return self.pixel.decode(x[:, :semantic.shape[1]], x[:, semantic.shape[1]:])

    @torch.no_grad()
    def encode(self, images: Tensor, scale: int = 1) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1] → codes int32 [b, M, gh, gw]."""
        self._check(tuple(images.shape[-2:]), scale)
        with torch.autocast(images.device.type, enabled=False):
            codes = self.quantizer.encode(self.latents(images.float(), self.features(images.float()), scale))
        step = self.patch_size * scale
        return to_grid(codes, (images.shape[-2] // step, images.shape[-1] // step)).to(torch.int32)

    @torch.no_grad()
    def decode(self, codes: Tensor, scale: int = 1) -> Tensor:
        """Codes [b, M, gh, gw] → pictures [b, 3, H, W], about [-1, 1]."""
        return self.render(self.quantizer.decode(from_grid(codes.long())), (codes.shape[-2], codes.shape[-1]), scale)

    def forward(self, images: Tensor, scale: int = 1, perturb: Callable[[Tensor], Tensor] | None = None) -> Reading:
        """`perturb`: codes → other codes of the same shape, which the pixel decoder gets to see instead (tokenizer/perturb.py)."""
        step = self.patch_size * scale
        grid = images.shape[-2] // step, images.shape[-1] // step
        features = self.features(images)
        latents = self.latents(images, features, scale)
        q = self.quantizer(latents)
        codes, seen = to_grid(q.codes, grid), q.entries
        if perturb is not None:
            seen = seen + (self.quantizer.decode(from_grid(perturb(codes))) - seen).detach()
        semantic = self.semantic_out(self.quantizer.parts(q.entries)[0].view(len(images), grid[0] * grid[1], -1), grid, scale)
        features = features.view(len(images), -1, features.shape[-1])
        return Reading(self.render(seen, grid, scale), semantic, q.entries, latents, features, codes, q.losses)

    def _check(self, size: tuple[int, ...], scale: int) -> None:
        if size not in self.sizes:
            takes = ", ".join(f"{h}x{w}" for h, w in self.sizes)
            raise ValueError(f"pictures are {size[0]}x{size[1]} px, this tokenizer takes {takes} px: resize them with data.images.fit")
        if scale not in self.scales:
            raise ValueError(f"scale {scale} is none of this tokenizer's scales {self.scales}")

    # On disk ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write model.safetensors, and config.json last and whole: where it is, all is."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.quantizer, SharedIndexQuantizer):
            self.quantizer.freeze()
        weights = safetensors.torch.save({k: v.contiguous() for k, v in self.state_dict().items()})
        text = self.text
        fields = {**asdict(self.config), "text_shape": (len(text.ids), text.width) if text else None,
                  "text_checksum": text.checksum if text else ""}
        if isinstance(self.semantic_tower, Tower):  # its weights are among ours: what builds it empty is all that is needed
            fields["tower_source"] = self.semantic_tower.describe(folder)
        settings = json.dumps(fields, indent=1) + "\n"
        (folder / "model.safetensors").write_bytes(weights)
        beside = folder / "config.json.tmp"
        beside.write_text(settings)
        beside.replace(folder / "config.json")
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
        checksum: str = fields.pop("text_checksum", "")
        fields["tower_source"] = fields["tower_source"].replace("FOLDER", str(folder))
        text = TextEmbedding(None, torch.zeros(text_shape[0], dtype=torch.long), text_shape[1], checksum) if text_shape else None
        config = TokenizerConfig(tower=TowerConfig(**tower), quantizer=QuantizerConfig(**_tuples(quantizer)), **_tuples(fields))
        model = cls(config, text)
        model.load_state_dict(safetensors.torch.load(weights))
        model.fingerprint = _fingerprint(settings, weights)
        return model.eval().requires_grad_(False)


class SemanticDecoder(nn.Module):
    """Semantic entries [b, n, d] → features [b, n, teacher width]."""

    def __init__(self, dims: int, width: int, out: int, layers: int) -> None:
        super().__init__()
        self.into = nn.Linear(dims, width)
        self.blocks = GridTransformer(width, layers, max(1, width // 64)) if layers else None
        self.out = nn.Sequential(nn.GELU(), nn.Linear(width, out)) if not layers else nn.Linear(width, out)

    def forward(self, x: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
        x = self.into(x)
        return self.out(self.blocks(x, grid, scale) if self.blocks is not None else x)


def tower_features(tower: nn.Module, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features [b, gh · gw, c] of a pretrained tower or one of our own on a code grid: pictures are resized to the tower's patches where
    these are of another size, and its positions to the grid."""
    if isinstance(tower, Tower):
        size = grid[0] * tower.patch_size, grid[1] * tower.patch_size
        if size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return tower(images)[1]
    moved = positions(tower, grid, "of our own")
    return (functional_call(tower, moved, (images,)) if moved else tower(images))[1]


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where dataclasses have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _fingerprint(settings: str, weights: bytes) -> str:
    return hashlib.sha256(settings.encode() + weights).hexdigest()[:16]
