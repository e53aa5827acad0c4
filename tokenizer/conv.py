"""The convolutional pixel branch: VQGAN's shape (Esser et al. 2021, arXiv:2012.09841, table 7) without attention, with RMSNorm
over channels, which unlike GroupNorm does not mix positions and is fast in bf16.

Letters: b batch, H W picture, c channels, P = 2^(levels − 1) pixels a position.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of [b, c, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = ChannelNorm(channels), ChannelNorm(out_channels)
        self.first = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(F.silu(self.second_norm(self.first(F.silu(self.first_norm(x))))))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvEncoder(nn.Sequential):
    """[b, 3, H, W] → [b, dims, H / P, W / P]: `blocks` residual blocks a level, halved between levels."""

    def __init__(self, channels: int, multipliers: tuple[int, ...], blocks: int, dims: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
        width = channels
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers.append(ResidualBlock(width, channels * multiplier))
                width = channels * multiplier
            if level + 1 < len(multipliers):
                layers.append(nn.Conv2d(width, width, 4, stride=2, padding=1))
        super().__init__(*layers, ResidualBlock(width, width), ChannelNorm(width), nn.SiLU(), nn.Conv2d(width, dims, 1))


class ConvDecoder(nn.Sequential):
    """[b, dims, H / P, W / P] → [b, 3, H, W]: the encoder backwards, one block more a level."""

    def __init__(self, channels: int, multipliers: tuple[int, ...], blocks: int, dims: int) -> None:
        width = channels * multipliers[-1]
        layers: list[nn.Module] = [nn.Conv2d(dims, width, 3, padding=1), ResidualBlock(width, width)]
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                layers.append(ResidualBlock(width, channels * multiplier))
                width = channels * multiplier
            if level:
                layers.append(Upsample(width))
        super().__init__(*layers, ChannelNorm(width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))
