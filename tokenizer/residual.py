"""Residual quantizer: each step quantizes what the steps before left over (RQ, Lee et al. 2022, arXiv:2203.01941, section 3.1).

One book serves all steps; the codes of a position are as many as steps. Letters: n positions, D steps, K entries, d dims.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.nearest import nearest
from tokenizer.quantize import Quantized, Quantizer, QuantizerConfig
from tokenizer.ranks import joined, rows_of_ranks
from tokenizer.tables import EmaTable, FreeTable


class ResidualQuantizer(Quantizer):
    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        if config.pixel_table not in ("free", "ema"):
            raise ValueError(f"quantizer.pixel_table is {config.pixel_table}: a residual quantizer's table is free or ema")
        self.config, self.num_books, self.codebook_size, self.dims = config, config.depth, config.codebook_size, config.dims
        self.table = (FreeTable if config.pixel_table == "free" else EmaTable)(config.codebook_size, config.dims)
        self.register_buffer("usage", torch.ones(self.num_books, self.codebook_size))

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            rows, left, codes = self.table.rows(), z.float(), list[Tensor]()
            for _ in range(self.num_books):
                codes.append(nearest(left, rows))
                left = left - rows[codes[-1]]
            return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.table.rows(codes).sum(1)

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z, codes = z.float(), self.encode(z)
            sums = self.table.rows(codes).cumsum(1)  # [n, D, d] after each step
            # the mean over steps of how far each partial sum is (RQ, equation 9)
            commit = (z[:, None] - sums.detach()).square().mean()
            loss = self.config.commitment * commit + ((z[:, None].detach() - sums).square().mean() if sums.requires_grad else 0)
            if self.training:
                self.count(codes)
                if isinstance(self.table, EmaTable):
                    left = z[:, None] - F.pad(sums, (0, 0, 1, 0))[:, :-1]
                    self.table.follow(left.detach().flatten(0, 1), codes.flatten())
            q = sums[:, -1] if self.config.gradient != "latent" else sums[:, -1].detach()
            return Quantized(q + (z - z.detach()), codes, {"quantize": loss})

    @torch.no_grad()
    def revive(self, z: Tensor, below: float = 0.03, seed: int = 0) -> int:
        """Move entries that all steps together use less than `below` of their fair share onto latents z [n, d] of all ranks."""
        dead = (self.usage.mean(0) < below).nonzero().squeeze(-1)
        total = len(joined(z[:, 0]))
        picks = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:len(dead)].to(z.device)
        self.table.put(dead[:len(picks)], rows_of_ranks(z.float(), picks))
        self.usage[:, dead[:len(picks)]] = 1.0
        return len(picks)
