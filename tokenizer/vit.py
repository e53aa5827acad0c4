"""A plain transformer over a grid of positions: RMSNorm, rotary positions in two directions, normed queries and keys, SwiGLU.

Positions are coordinates in units of the finest grid, so coarser grids (`step` > 1) and other aspects need no table of their own
(axial rotary embedding: Heo et al. 2024, arXiv:2403.13298, section 3.2). Letters: b batch, gh gw grid, n = gh · gw, c width, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotations(grid: tuple[int, int], step: int, dims: int, device: torch.device, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """cos and sin [n, d / 2]: half of the pairs turn with the row, half with the column."""
    rate = base ** -(torch.arange(dims // 4, device=device) / (dims // 4))
    y, x = ((torch.arange(size, device=device) + 0.5) * step for size in grid)
    angle = torch.cat([(y[:, None] * rate)[:, None].expand(-1, grid[1], -1), (x[:, None] * rate)[None].expand(grid[0], -1, -1)], -1)
    return angle.flatten(0, 1).cos(), angle.flatten(0, 1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[b, heads, n, d] turned pairwise; dims i and i + d / 2 make a pair."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Block(nn.Module):
    """[b, n, c] → [b, n, c]; writes nothing at the start."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, hidden = heads, -(-8 * width // 3 // 16) * 16  # SwiGLU with the parameters of a 4 × MLP
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_norm, self.key_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [b, heads, n, d]
        q, k = rotate(self.query_norm(q), cos, sin), rotate(self.key_norm(k), cos, sin)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class GridTransformer(nn.Module):
    """[b, n, c] → [b, n, c] through `layers` blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads or width // heads % 4:
            raise ValueError(f"a width of {width} over {heads} heads gives {width / heads:g} dims a head, which must be a multiple of 4: "
                             "change width or heads")
        self.head_dims = width // heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor, grid: tuple[int, int], step: int = 1) -> Tensor:
        cos, sin = rotations(grid, step, self.head_dims, x.device)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)
