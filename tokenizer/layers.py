"""The pixel branch: pictures ↔ latents on a grid. Closed forms of patches, convolutions (tokenizer/conv.py), transformers (vit.py).

A closed form finds in seconds what a network needs minutes to come near; what training adds on top has to earn its place from
there. So every residual branch ends in zeros and the first step equals the closed form.

Letters: b batch, H W picture, P patch size, gh gw grid (H / P, W / P), c channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.axis import lower_median, principal_axis
from tokenizer.conv import ConvDecoder, ConvEncoder
from tokenizer.vit import GridTransformer


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
        middle = lower_median(images.flatten(2))[:, None]  # [b, 1, 3]
        mean = x.mean(-1)
        centred = x - mean[..., None]
        axis = principal_axis(centred @ centred.mT)  # [b, g, 3]
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


class ClosedPixels(nn.Module):
    """Closed-form patches, and a decoder that starts as the identity on what they rebuild: PixelDecoder."""

    def __init__(self, patches: PalettePatches | LinearPatches, semantic_dims: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.patches = patches
        self.decoder = PixelDecoder(patches.patch_size, semantic_dims, channels, blocks)

    def encode(self, images: Tensor) -> Tensor:
        """[b, 3, H, W] → [b, Σ dp, gh, gw]"""
        grid = images.shape[-2] // self.patches.patch_size, images.shape[-1] // self.patches.patch_size
        return to_grid(self.patches(images), grid)

    def decode(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """[b, M · ds, gh, gw], [b, Σ dp, gh, gw] → [b, 3, H, W]"""
        return self.decoder(self.patches.decode(from_grid(pixel), (pixel.shape[-2], pixel.shape[-1])), semantic)


class ConvPixels(nn.Module):
    """A convolutional autoencoder; the decoder reads both parts."""

    def __init__(self, patch_size: int, dims: int, read_dims: int, channels: int, multipliers: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        if 2 ** (len(multipliers) - 1) != patch_size:
            raise ValueError(f"{len(multipliers)} levels of channels (multipliers {multipliers}) shrink a picture by "
                             f"{2 ** (len(multipliers) - 1)}, a patch has {patch_size} px: give log2(patch) + 1 multipliers")
        self.encoder = ConvEncoder(channels, multipliers, blocks, dims)
        self.decoder = ConvDecoder(channels, multipliers, blocks, read_dims)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        return self.decoder(torch.cat([semantic, pixel], 1))


class VitPixels(nn.Module):
    """A transformer autoencoder on patches; a residual convolution on its picture mends patch borders."""

    def __init__(self, patch_size: int, dims: int, read_dims: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed, self.out = nn.Linear(3 * patch_size**2, width), nn.Linear(width, dims)
        self.encoder, self.decoder = GridTransformer(width, layers, heads), GridTransformer(width, layers, heads)
        self.read, self.pixels = nn.Linear(read_dims, width), nn.Linear(width, 3 * patch_size**2)
        self.mend = ResidualConv(3, 32)

    def encode(self, images: Tensor) -> Tensor:
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        x = self.embed(patches_of(images, self.patch_size)).view(len(images), grid[0] * grid[1], -1)
        return to_grid(self.out(self.encoder(x, grid)).flatten(0, 1), grid)

    def decode(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        x = torch.cat([semantic, pixel], 1)
        grid = x.shape[-2], x.shape[-1]
        x = self.pixels(self.decoder(self.read(x.flatten(2).mT), grid))
        return self.mend(unpatch(x.flatten(0, 1).unflatten(-1, (3, -1)), grid))


def to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[b · gh · gw, d] → [b, d, gh, gw]"""
    return x.view(-1, *grid, x.shape[-1]).permute(0, 3, 1, 2)


def from_grid(x: Tensor) -> Tensor:
    """[b, d, gh, gw] → [b · gh · gw, d]"""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
