"""Where a codebook's rows come from: each kind of table gives [K, d] rows, or those of some codes alone, and learns in its own way.

    FreeTable    rows are parameters
    EmaTable     rows follow the mean of the latents that chose them (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1)
    SimvqTable   frozen Gaussian rows under a trained projection (SimVQ, Zhu et al. 2024, arXiv:2411.02038, section 4.1)
    TextTable    phrases of a frozen text embedding under a trained projection (TA-Tok, Han et al. 2025, arXiv:2506.18898, section 3.1)

The rows of some codes are bit for bit those of the whole: a projection is of all rows, since a product of fewer may round differently.
`put` moves rows (a start, a revived code); tables whose rows are a projection cannot, and say so by `movable`.

Letters: n latents, K entries, d their dims, V D rows and width of a text embedding, p tokens in a phrase.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.ranks import sum_over_ranks

Kind = Literal["free", "ema", "simvq", "text"]


class FreeTable(nn.Module):
    movable = True

    def __init__(self, count: int, dims: int) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.randn(count, dims) / dims**0.5)

    def rows(self, codes: Tensor | None = None) -> Tensor:
        return self.entries if codes is None else F.embedding(codes, self.entries)

    @torch.no_grad()
    def put(self, index: Tensor, values: Tensor) -> None:
        """Set rows `index` [m] to values [m, d]."""
        self.entries[index] = values.to(self.entries)


class EmaTable(nn.Module):
    """Rows are `total / size`, moving sums of the latents that chose a row and of how many there were. For rows that are
    compared by direction, the mean and the sum point the same way."""

    movable = True
    total: Tensor
    """[K, d]"""
    size: Tensor
    """[K]"""

    def __init__(self, count: int, dims: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("total", torch.randn(count, dims) / dims**0.5)
        self.register_buffer("size", torch.ones(count))

    def rows(self, codes: Tensor | None = None) -> Tensor:
        total, size = (self.total, self.size) if codes is None else (self.total[codes], self.size[codes])
        return total / size.clamp_min(1e-5)[..., None]

    @torch.no_grad()
    def put(self, index: Tensor, values: Tensor) -> None:
        self.total[index], self.size[index] = values.to(self.total), 1.0

    @torch.no_grad()
    def follow(self, z: Tensor, codes: Tensor) -> None:
        """Move towards the latents z [n, d] of all ranks that chose codes [n]."""
        grown = torch.zeros(len(self.size), z.shape[1] + 1, device=z.device)
        grown.index_add_(0, codes, torch.cat([z, torch.ones_like(z[:, :1])], -1))  # sums and counts: one all-reduce
        sum_over_ranks(grown)
        self.total.lerp_(grown[:, :-1], 1 - self.momentum)
        self.size.lerp_(grown[:, -1], 1 - self.momentum)


class SimvqTable(nn.Module):
    movable = False
    gaussian: Tensor
    """[K, d]"""

    def __init__(self, count: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("gaussian", torch.randn(count, dims) / dims**0.5)
        self.projection = nn.Parameter(torch.eye(dims))

    def rows(self, codes: Tensor | None = None) -> Tensor:
        rows = self.gaussian @ self.projection
        return rows if codes is None else F.embedding(codes, rows)


class TextTable(nn.Module):
    """A row is the mean of its phrase's token embeddings, projected. The embedding itself (a language model's is large) is needed to
    train, not to encode: what is saved are the projected rows, and which rows of the embedding they came from."""

    movable = False
    phrases: Tensor
    """[K, p] int64 rows of `text`"""
    frozen: Tensor
    """[K, d] the rows as last saved, used when there is no `text`"""
    ids: Tensor
    """[V] int64 token ids of the rows of `text`"""

    def __init__(self, count: int, dims: int, text: Tensor | None, ids: Tensor, width: int, phrase_len: int = 1) -> None:
        """text [V, D] centred, rows of unit length on average, or None to use what is loaded; ids [V]; width: D."""
        super().__init__()
        self.text = text
        self.register_buffer("ids", ids.clone())
        self.register_buffer("phrases", (torch.arange(count)[:, None] + torch.arange(phrase_len)) % len(ids))
        self.register_buffer("frozen", torch.zeros(count, dims))
        self.projection = nn.Parameter(torch.empty(width, dims))
        nn.init.orthogonal_(self.projection)

    def rows(self, codes: Tensor | None = None) -> Tensor:
        if self.text is None:
            rows = self.frozen
        else:
            if self.text.device != self.projection.device:
                self.text = self.text.to(self.projection.device)
            rows = F.embedding_bag(self.phrases, self.text, mode="mean") @ self.projection
        return rows if codes is None else F.embedding(codes, rows)

    @torch.no_grad()
    def freeze(self) -> None:
        self.frozen.copy_(self.rows())

    def words(self) -> Tensor:
        """[K, p] token ids that name each code."""
        return self.ids[self.phrases]

    @torch.no_grad()
    def fit(self, phrases: Tensor, target: Tensor) -> None:
        """Take phrases [K, p], and the projection (ridge regression) under which each phrase's row points at target [K, d]."""
        assert self.text is not None, "a table without its text embedding cannot be fitted"
        self.phrases.copy_(phrases)
        rows = self.text[phrases].mean(1)  # [K, D]
        gram = (rows.T @ rows).double()
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        self.projection.copy_(torch.linalg.solve(gram, (rows.T @ target).double()).float())
