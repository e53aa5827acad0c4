"""Networks that tell pictures from reconstructions: one reads pixels, one reads a frozen tower's features.

Both give a logit a place, [b, n], above 0 for real, and neither knows its batch: normalization is by groups of one picture's
channels, so a picture's logits are the same alone, in any batch, and on any number of ranks. (Isola et al. trained with one picture a
batch, where their batch normalization is this with groups of 1. Spectral normalization, the other choice, moves a buffer in each
forward pass, of which a step has three, and the ranks' buffers part.)

Letters: b batch, H W picture, n places that get a logit, c channels, h w a feature map.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judges overlapping squares of 9 · 2^layers − 2 px (Isola et al. 2017, arXiv:1611.07004, section 3.2.2 and appendix 6.1.2):
    16, 34, 70 px for 1, 2, 3 layers. A 256-px picture takes 3, a 32-px picture 2 or 1."""

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.layers = layers
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]  # unnormalized: sees absolute colour
        for i in range(1, layers + 1):
            blocks += [nn.Conv2d(widths[i - 1], widths[i], 4, 2 if i < layers else 1, 1, bias=False), _norm(widths[i]), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for block in self.net:
            if isinstance(block, nn.Conv2d):
                nn.init.normal_(block.weight, std=0.02)  # appendix 6.2

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, H, W] → logits [b, n], n = (H / 2^layers − 2)(W / 2^layers − 2)"""
        smallest = 3 * 2**self.layers
        if min(images.shape[-2:]) < smallest:
            raise ValueError(f"pictures of {tuple(images.shape[-2:])} px are too small for a discriminator of {self.layers} layers, which "
                             f"takes {smallest} px and more: lower discriminator.layers")
        return self.net(images).flatten(1)


class FeatureDiscriminator(nn.Module):
    """Judges what a frozen tower sees, a head for each of several layers (Sauer et al. 2023, arXiv:2301.09515, section 3.2), so it
    starts with a sense of shape that a network on pixels has to learn; heads as UniTok's (Ma et al. 2025, arXiv:2502.20321).

    tower: pictures [b, 3, H, W] in [-1, 1] → as many feature tensors as heads; its own business to resize and rescale pictures, and
    the caller's to put it on a device. Of a timm ViT: `lambda x: vit.forward_intermediates(x, indices=[2, 5, 8], output_fmt="NLC",
    intermediates_only=True)`; open_clip's names the same list "image_intermediates". Gradients go through it to the pictures and
    stay out of its weights, which are in no parameters() or state_dict(): they have a file.
    """

    tower: Callable[[Tensor], Sequence[Tensor]]

    def __init__(self, tower: Callable[[Tensor], Sequence[Tensor]], dims: Sequence[int], maps: bool = False) -> None:
        """dims: channels of each layer. maps: layers are [b, c, h, w] and heads convolve in two dims; else tokens [b, n, c], one."""
        super().__init__()
        if isinstance(tower, nn.Module) and (tower.training or any(p.requires_grad for p in tower.parameters())):
            raise ValueError("the discriminator's tower is in training, and a judge must not move with the judged: "
                             "give a copy that is frozen, tower.eval().requires_grad_(False)")
        object.__setattr__(self, "tower", tower)  # beside the module tree, not in it
        self.maps, self.dims = maps, tuple(dims)
        self.heads = nn.ModuleList(Head(dim, maps) for dim in dims)

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, H, W] → logits [b, n], the layers' one after another"""
        layers = self.tower(images)
        if [x.shape[1 if self.maps else -1] for x in layers] != list(self.dims) or {x.ndim for x in layers} != {4 if self.maps else 3}:
            raise ValueError(f"the discriminator's tower gives {[list(x.shape) for x in layers]}, heads were built for "
                             f"{'maps [b, c, h, w]' if self.maps else 'tokens [b, n, c]'} with c = {list(self.dims)}: change dims or maps")
        return torch.cat([head(x if self.maps else x.mT) for head, x in zip(self.heads, layers, strict=True)], -1)


class Head(nn.Module):
    """[b, c, places…] → logits [b, n]: mixes channels, then nine neighbours with a residual, then judges. The neighbours are nine
    tokens in raster order or 3 × 3; borders wrap around, so a zero there does not tell a head where it is."""

    def __init__(self, dim: int, maps: bool) -> None:
        super().__init__()
        conv = nn.Conv2d if maps else nn.Conv1d
        reach = 3 if maps else 9
        self.first = nn.Sequential(conv(dim, dim, 1), _norm(dim), nn.LeakyReLU(0.2))
        self.mix = nn.Sequential(conv(dim, dim, reach, padding=reach // 2, padding_mode="circular"), _norm(dim), nn.LeakyReLU(0.2))
        self.last = conv(dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last((x + self.mix(x)) * 0.5**0.5).flatten(1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


# What a discriminator is shown -------------------------------------------------------------------------------------

DRAWS = 7
"""Numbers that a picture is augmented by."""


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Colour, translation and cutout, drawn anew for each picture, through which gradients pass (Zhao et al. 2020, arXiv:2006.10738,
    section 3.2): for real pictures and reconstructions alike, in both sides' steps. draws [b, 7] in [0, 1): on the CPU, whatever the
    pictures."""
    return cut_out(translate(recolour(images, draws[:, :3]), draws[:, 3:5]), draws[:, 5:])


def recolour(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness ± 0.5, saturation × [0, 2], contrast × [0.5, 1.5]: [b, 3, H, W], [b, 3] → [b, 3, H, W]"""
    brightness, saturation, contrast = draws.T[..., None, None, None].to(images)  # [b, 1, 1, 1] each
    x = images + (brightness - 0.5)
    x = x.mean(1, keepdim=True).lerp(x, saturation * 2)
    return x.mean((1, 2, 3), keepdim=True).lerp(x, contrast + 0.5)


def translate(images: Tensor, draws: Tensor) -> Tensor:
    """By whole pixels, up to an eighth of the picture; grey comes in: [b, 3, H, W], [b, 2] → [b, 3, H, W]"""
    height, width = images.shape[-2:]
    reach = height // 8, width // 8
    tops, lefts = ((draw * (2 * r + 1)).long().tolist() for draw, r in zip(draws.unbind(1), reach, strict=True))
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0])).unbind()  # unbind, slice, stack: exact, and so is its gradient
    return torch.stack([x[:, top:top + height, left:left + width] for x, top, left in zip(padded, tops, lefts, strict=True)])


def cut_out(images: Tensor, draws: Tensor) -> Tensor:
    """A grey rectangle of half the height and width, centred anywhere in the picture: [b, 3, H, W], [b, 2] → [b, 3, H, W]"""
    inside: list[Tensor] = []
    for draw, size in zip(draws.unbind(1), images.shape[-2:], strict=True):
        start = (draw[:, None] * size).long() - size // 4
        place = torch.arange(size) - start
        inside.append(((place >= 0) & (place < size // 2)).to(images.device))  # [b, size]
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)
