"""What judges pictures: networks whose features are compared between originals and reconstructions, weights given by path.

A Fréchet distance is named for its features. Only those of the FID Inception network make an `rfid`; an open_clip tower NAME makes a
`fid_clip:NAME`, the tokenizer's own tower an `fd_teacher`, its codes an `fd_codes`. Weights are opened when an extractor is made, so a
wrong path is one line before anything is computed; nothing is ever downloaded.

Letters: b pictures, H W pixels, d dims of a feature, C classes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tokenizer import clip_halves
from tokenizer.contrastive import TextTower
from tokenizer.layers import from_grid
from tokenizer.metrics import full_precision
from tokenizer.model import VisualTokenizer
from tokenizer.objective import CodeContrast
from tokenizer.text import TextTokenizer
from tokenizer.tower_source import Source, fill, weights_in

HEAD = "contrast.safetensors"
"""What training leaves beside a tokenizer that had a contrastive loss: its head and text tower; text.model is of the latter's pieces."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Pictures → features, and the names of what is measured with them."""

    name: str
    """Of the network, where accuracies are told apart by it."""
    distance: str
    """Fréchet distance of reconstructions from originals."""
    perturbed: str
    """That of pictures decoded from perturbed codes."""
    embed: Callable[[Tensor], Tensor]
    """uint8 [b, 3, H, W] → [b, d] float32"""
    embed_classes: Callable[[Sequence[str]], Tensor] | None = None
    """Class names → [C, d] in the same space, one prompt each; None where there is no text tower, or `unread` says why not."""
    unread: str = ""
    weights: str = ""
    """First 16 hex digits of the weight file's SHA-256."""


def inception(weights: Path, device: torch.device | str = "cpu") -> Extractor:
    """The FID network: Inception v3 of 2015-12-05 as torch-fidelity holds it (TensorFlow 1's bilinear resize to 299 px, (x − 128) / 128),
    2,048 pooled features, fp32."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    digest = opened(weights, "Inception weights", "--inception", "weights-inception-2015-12-05-6726825d.pth of torch-fidelity")
    try:
        torch.load(weights, weights_only=True, map_location="cpu")  # torch-fidelity unpickles whatever it is given
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    except Exception as error:
        raise ValueError(f"{weights} holds no weights of the FID Inception network: {_short(error)}. Give --inception the file of "
                         "torch-fidelity, not torchvision's") from error
    network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(pictures: Tensor) -> Tensor:
        with full_precision():
            return network(pictures)[0]

    return Extractor(name="inception", distance="rfid", perturbed="pfid", embed=embed, weights=digest)


def clip(name: str, weights: Path, device: torch.device | str = "cpu") -> Extractor:
    """An open_clip model, see `tokenizer.tower_source` for its name: pictures resized to the tower's side (x / 255, bicubic, antialiased,
    clipped to [0, 1]) and normalised as its weights were trained, pooled embedding in fp32, not made of unit length."""
    short = Path(name).name
    digest = opened(weights_in(weights) if weights.is_dir() else weights, f"weights of {short}", "--clip-weights",
                    "an open_clip checkpoint (.safetensors, .pt)")
    source = Source(library="open_clip", name=name, weights=weights)
    half = clip_halves.load(source, "vision")
    tower, side = half.tower.to(device).eval().requires_grad_(False), half.config["image_size"]
    size = tuple(side) if isinstance(side, (tuple, list)) else (side, side)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in half.statistics)

    @torch.no_grad()
    def embed(pictures: Tensor) -> Tensor:
        x = pictures.float() / 255
        if tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        with full_precision():
            return tower((x - mean) / std).float()

    try:
        tokenize, unread = clip_halves.tokenizer(source, clip_halves.describe(source)[0]["text_cfg"]), ""
    except (FileNotFoundError, ValueError) as error:
        tokenize, unread = None, str(error)

    @torch.no_grad()
    def embed_classes(names: Sequence[str]) -> Tensor:
        assert tokenize is not None
        text = clip_halves.load(source, "text").tower.to(device).eval()  # only now: not every set has classes
        ids = tokenize([f"a photo of a {one}." for one in names])
        return torch.cat([text(part.to(device)).float() for part in ids.split(256)])

    return Extractor(name=f"clip:{short}", distance=f"fid_clip:{short}", perturbed=f"pfid_clip:{short}", embed=embed,
                     embed_classes=None if tokenize is None else embed_classes, unread=unread, weights=digest)


def teacher(features: Callable[[Tensor], Tensor]) -> Extractor:
    """The tokenizer's own frozen tower, `VisualTokenizer.features`: mean over the patches of x / 127.5 − 1. Needs no weights besides the
    tokenizer's; the codes were trained to please it, so it flatters, and it compares one tokenizer's settings, not two tokenizers."""
    @torch.no_grad()
    def embed(pictures: Tensor) -> Tensor:
        with full_precision():
            patches = features(pictures.float() / 127.5 - 1)  # [b · gh · gw, c]
        return patches.view(len(pictures), -1, patches.shape[-1]).mean(1).float()

    return Extractor(name="teacher", distance="fd_teacher", perturbed="pfd_teacher", embed=embed)


def codes(visual: VisualTokenizer, folder: Path, device: torch.device | str = "cpu") -> Extractor:
    """The tokenizer's codes as its own head reads them: the mean semantic entry of a picture, at the finest scale, mapped to where the text
    tower of its contrastive loss puts captions. Zero-shot accuracy of this kind is what UniTok (Ma et al. 2025, arXiv:2502.20321) reports.
    Both were left by training beside the tokenizer."""
    path = folder / HEAD
    with safe_open(path, "pt") as file:
        made, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "text_tower" not in made:
        raise ValueError(f"{path} does not say what its text tower is: it was written by an older version, train again to measure with it")
    if made["text_tower"]:
        text = TextTower.load(made["text_tower"])
    else:
        pieces = TextTokenizer.load(folder / "text.model")
        text = TextTower.small(visual.config.tower, pieces.size, pieces.encode)
    contrast = CodeContrast(visual.quantizer.part_dims[0], text, "sigmoid" if "loss.bias" in weights else "softmax")
    fill(contrast, weights, path, "the tokenizer's head and text tower")
    contrast = contrast.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(pictures: Tensor) -> Tensor:
        with full_precision():
            found = from_grid(visual.encode(pictures.float() / 127.5 - 1, min(visual.scales)).long())
            semantic = visual.quantizer.parts(visual.quantizer.decode(found))[0]
            return contrast.embed(semantic.view(len(pictures), -1, contrast.dims)).float()

    @torch.no_grad()
    def embed_classes(names: Sequence[str]) -> Tensor:
        ids = text.tokenize([f"a photo of a {one}." for one in names])
        return torch.cat([text(part.to(device)).float() for part in ids.split(256)])

    return Extractor(name="codes", distance="fd_codes", perturbed="pfd_codes", embed=embed, embed_classes=embed_classes)


def opened(path: Path, what: str, knob: str, give: str) -> str:
    """First 16 hex digits of a file's SHA-256. Errors: FileNotFoundError that says what is missing and what to give."""
    if not path.is_file():
        raise FileNotFoundError(f"there are no {what} at {path}: give {knob} {give}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
