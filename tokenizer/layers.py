"""The pixel branch: patches ↔ latents in closed form, and residual convolutions that start as nothing.

A closed form finds in seconds what a network needs minutes to come near; what training adds on top has to earn its place from
there. So every residual branch ends in zeros and the first step equals the closed form.

Letters: b batch, H W picture, P patch size, gh gw grid (H / P, W / P), c channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PalettePatches(nn.Module):
    """A patch as two colours and a pattern between them: pixel = ground + pattern · (figure − ground).

    The colour line of block truncation coding (Delp and Mitchell 1979, doi:10.1109/TCOM.1979.1094560; colour: Campbell et al.
    1986): the patch's principal colour axis, its ends and each pixel's place on it. Two books of it multiply: every
    pattern goes with every palette, so a shape seen in red can be drawn in blue. The ground is the end nearer to the picture's
    median colour. Latents: palette [6] (ground, figure), pattern [P · P] in [0, 1]. Nothing is learned.
    """

    def __init__(self, patch_size: int, flat: float = 0.02) -> None:
        super().__init__()
        self.patch_size, self.flat = patch_size, flat

    @property
    def dims(self) -> tuple[int, ...]:
        return 6, self.patch_size**2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, H, W] → [b · gh · gw, 6 + P · P]"""
        b = len(images)
        x = patches_of(images, self.patch_size).view(b, -1, 3, self.patch_size**2)  # [b, g, 3, P P]
        middle = images.flatten(2).median(-1).values[:, None]  # [b, 1, 3]
        mean = x.mean(-1)
        centred = x - mean[..., None]
        axis = torch.linalg.eigh(centred @ centred.mT)[1][..., -1]  # [b, g, 3]
        place = (axis[..., None] * centred).sum(-2)  # [b, g, P P]
        low, high = place.amin(-1, keepdim=True), place.amax(-1, keepdim=True)
        ends = mean + low * axis, mean + high * axis
        swap = ((ends[1] - middle).square().sum(-1) < (ends[0] - middle).square().sum(-1))[..., None]
        ground, figure = torch.where(swap, ends[1], ends[0]), torch.where(swap, ends[0], ends[1])
        pattern = (place - low) / (high - low).clamp_min(self.flat)
        pattern = torch.where(swap, 1 - pattern, pattern)
        plain = high - low < self.flat
        ground, figure = torch.where(plain, mean, ground), torch.where(plain, mean, figure)
        return torch.cat([ground, figure, pattern.masked_fill(plain, 0)], -1).flatten(0, 1)

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """[b · gh · gw, 6 + P · P] → [b, 3, H, W]"""
        ground, figure, pattern = latents.split([3, 3, self.patch_size**2], -1)
        return unpatch(ground[..., None] + (figure - ground)[..., None] * pattern[:, None], grid)


class LinearPatches(nn.Module):
    """A patch as its projection on the principal axes of many: the best linear code; the latents of one book, or of
    several side by side. `start` fits it."""

    colour: Tensor
    """[3] mean colour, which latents are relative to"""
    basis: Tensor
    """[Σ dims, 3 P P] orthogonal rows of one length"""

    def __init__(self, patch_size: int, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.patch_size, self.dims = patch_size, dims
        self.register_buffer("colour", torch.zeros(3))
        self.register_buffer("basis", torch.eye(sum(dims), 3 * patch_size**2))

    @torch.no_grad()
    def start(self, patches: Tensor) -> None:
        """patches [n, 3 P P]. About the mean colour; scaled so that the mean squared length of the latents is 1."""
        self.colour.copy_(patches.view(len(patches), 3, -1).mean((0, 2)))
        centred = patches - self.colour.repeat_interleave(self.patch_size**2)
        _, vectors = torch.linalg.eigh((centred.T @ centred / len(patches)).double())
        self.basis.copy_(vectors.flip(-1)[:, :sum(self.dims)].T)
        self.basis.mul_((centred @ self.basis.T).square().sum(-1).mean().rsqrt())

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, H, W] → [b · gh · gw, Σ dims]"""
        return (patches_of(images, self.patch_size) - self.colour.repeat_interleave(self.patch_size**2)) @ self.basis.T

    def decode(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """[b · gh · gw, Σ dims] → [b, 3, H, W]"""
        patches = latents @ self.basis / self.basis[0].square().sum()
        return unpatch(patches.view(len(patches), 3, -1) + self.colour[:, None], grid)


class ResidualConv(nn.Module):
    """x + conv(silu(conv(x))), 3 × 3, [b, c, h, w]; the last kernel starts at zero."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.silu(self.first(x)))


class PixelDecoder(nn.Module):
    """Adds to a picture rebuilt from patches what the semantic entries know, then convolutions over the joined picture,
    which see across patch borders: [b, 3, H, W], [b, ds, gh, gw] → [b, 3, H, W]. Starts as the identity."""

    def __init__(self, patch_size: int, semantic_dim: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.semantic = nn.ConvTranspose2d(semantic_dim, 3, patch_size, stride=patch_size, bias=False)
        nn.init.zeros_(self.semantic.weight)
        self.refine = nn.Sequential(*(ResidualConv(3, channels) for _ in range(blocks)))

    def forward(self, picture: Tensor, semantic: Tensor) -> Tensor:
        return self.refine(picture + self.semantic(semantic))


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """[b, 3, H, W] → [b · gh · gw, 3 · P · P], raster order, flattened (3, P, P)."""
    b, c, h, w = images.shape
    x = images.view(b, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * patch_size * patch_size)


def unpatch(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[b · gh · gw, 3, P · P] → [b, 3, H, W]"""
    (gh, gw), p = grid, round(patches.shape[-1]**0.5)
    x = patches.reshape(-1, gh, gw, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(x), 3, gh * p, gw * p)
