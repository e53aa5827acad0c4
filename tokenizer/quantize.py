"""Shared-index dual product quantizer: one code looks up a semantic and a pixel entry.

Book m has a semantic table Es_m and a pixel table Ep_m with one index for both:

    z = [√a · l2(zs), √b · l2(zp)]      E = [√a · l2(Es), √b · l2(Ep)]      i = argmax_k z · E_k − |E_k|² / 2

which is the nearest entry, found in one chunked product; gradients pass straight through from entries to latents. Settings of this one
formula are: TokenFlow (one book, a = b; Qu et al. 2024, arXiv:2412.03069, section 3.1), UniTok (M books without a pixel part; Ma
et al. 2025, arXiv:2502.20321, section 3.2), TA-Tok (a text table without a pixel part), VQGAN (no semantic part), and separate streams as
in DualToken (two books with weights (1, 0) and (0, 1)). Parts may be left at their own length instead of l2: then length counts.

The semantic table can be *text-aligned*: rows of a text embedding under a projection. TA-Tok gives each code a row of its own, so K
may not exceed the usable rows. Where a pixel entry tells codes apart rows may repeat: a code is a short phrase and a look.

Letters: n positions, M books, K entries a book, ds dp_m dims of book m's semantic and pixel part.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.nearest import AllRows, nearest, neighbours
from tokenizer.nearest import entropies as sample_entropies
from tokenizer.ranks import joined, rows_of_ranks, sum_over_ranks
from tokenizer.tables import EmaTable, FreeTable, Kind, SimvqTable, TextTable


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Kind, sizes and weights of a quantizer."""

    kind: Literal["shared", "residual", "fsq", "lfq", "bsq"] = "shared"
    """shared: this module; residual: depth steps of one book; fsq, lfq, bsq: without tables (tokenizer/lookup_free.py)."""
    codebook_size: int = 128
    """K: entries of each book (shared, residual)."""
    semantic_dim: int = 16
    """ds: semantic dims of a book (shared)."""
    pixel_dims: tuple[int, ...] = (6, 64)
    """dp of each book; as many books as numbers (shared)."""
    semantic_weights: tuple[float, ...] = (0.003,)
    """a of each book, or one for all: weight of the semantic part in the choice of a code."""
    pixel_weights: tuple[float, ...] = (1.0,)
    """b of each book, or one for all: weight of the pixel part."""
    semantic_norm: bool = True
    """Semantic parts have unit length."""
    pixel_norm: bool = False
    """Pixel parts have unit length; closed-form patches need theirs."""
    semantic_table: Kind = "text"
    """Where semantic rows come from; text needs a text embedding."""
    pixel_table: Kind = "free"
    """Where pixel rows come from."""
    gradient: Literal["latent", "both", "all"] = "both"
    """Whom a reader's gradient reaches: the latent alone, straight through (van den Oord et al. 2017, section 3.2); the chosen entry too;
    or every entry (IBQ; dot products choose)."""
    phrase_len: int = 2
    """p: text tokens whose mean is a code's semantic row (text)."""
    commitment: float = 0.25
    """Weight of the encoder's pull towards the entries (van den Oord et al. 2017, arXiv:1711.00937, equation 3)."""
    entropy_temperature: float = 0.05
    """Of the softmax in the entropy term, which `entropy` in the losses weighs."""
    entropy_latents: int = 0
    """Latents of a batch that the entropy term looks at (lfq and bsq look at all, whatever the number); 0 leaves the term out. Tables
    under a projection (simvq, text) need it: their rows cannot be revived."""
    depth: int = 4
    """Steps of a residual quantizer, each a book."""
    dims: int = 16
    """Dims of a residual quantizer's latents."""
    bits: tuple[int, ...] = (9, 9)
    """Bits of each book (lfq, bsq): K = 2^bits, the same for all."""
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Values of each dim (fsq): K is their product."""

    def __post_init__(self) -> None:
        if self.kind == "shared":
            for name in ("semantic_weights", "pixel_weights"):
                if len(getattr(self, name)) not in (1, self.num_books):
                    raise ValueError(f"quantizer.{name} has {len(getattr(self, name))} numbers for {self.num_books} books: "
                                     "give one, or one a book")
            if not self.semantic_dim and not min(self.pixel_dims):
                raise ValueError("a book has neither semantic nor pixel dims: raise quantizer.semantic_dim or quantizer.pixel_dims")
            if self.gradient == "all" and "ema" in (self.semantic_table, self.pixel_table):
                raise ValueError("quantizer.gradient 'all' trains entries by gradient, an ema table takes none: use free, simvq or text")
            if self.gradient == "all" and min(*self.semantic_weights, *self.pixel_weights, 1.0) <= 0:
                raise ValueError("quantizer.gradient 'all' needs every weight above 0: set semantic_weights and pixel_weights, or the "
                                 "dims of a part to 0")
        if self.kind in ("lfq", "bsq") and len(set(self.bits)) > 1:
            raise ValueError(f"quantizer.bits are {self.bits}: every book needs as many, they share one code range")

    @property
    def num_books(self) -> int:
        """M: codes at each position."""
        return {"shared": len(self.pixel_dims), "residual": self.depth, "fsq": 1}.get(self.kind, len(self.bits))

    def weights(self, book: int) -> tuple[float, float]:
        """(a, b) of a book."""
        return (self.semantic_weights[book % len(self.semantic_weights)], self.pixel_weights[book % len(self.pixel_weights)])


class Quantized(NamedTuple):
    entries: Tensor
    """[n, dims] laid out as the latents; gradients reach both the entries and what they stand for"""
    codes: Tensor
    """[n, M] int64"""
    losses: dict[str, Tensor]
    """`quantize`: codebook and commitment; `entropy`, where the quantizer has one"""


class TextEmbedding(NamedTuple):
    """Rows that a text table is made of."""

    rows: Tensor | None
    """[V, D] centred, of unit length on average; None in a loaded tokenizer, which has the projected rows"""
    ids: Tensor
    """[V] token ids"""
    width: int
    """D"""
    checksum: str = ""
    """Of the whole embedding of a language model that they were taken from, as tokenizer/text_rows.py has it; empty for other rows"""


class Quantizer(nn.Module, ABC):
    """What every quantizer is asked: latents [n, dims] → codes [n, M] → entries [n, dims].

    The latents are semantic parts book by book, then pixel parts book by book. Quantizers that do not split give both readers the whole.
    """

    num_books: int
    codebook_size: int
    dims: int
    usage: Tensor
    """[M, K] moving share of each code, times K; buffer"""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor: ...

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized: ...

    def parts(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """[n, dims] → what the semantic and the pixel decoder read."""
        return entries, entries

    @property
    def part_dims(self) -> tuple[int, int]:
        return self.dims, self.dims

    def count(self, codes: Tensor, momentum: float = 0.98) -> None:
        """Follow how often each code is chosen, over all ranks."""
        with torch.no_grad():
            books = torch.arange(self.num_books, device=codes.device) * self.codebook_size
            seen = torch.bincount((codes + books).flatten(), minlength=self.usage.numel()).float().view_as(self.usage)
            sum_over_ranks(seen)
            self.usage.lerp_(seen * (self.codebook_size / seen[0].sum()), 1 - momentum)

    def perplexity(self) -> list[float]:
        """exp of the entropy of each book's moving usage: how many codes are in use, counted by weight."""
        share = self.usage / self.usage.sum(-1, keepdim=True)
        return torch.special.entr(share).sum(-1).exp().tolist()

    @torch.no_grad()
    def neighbours(self, count: int) -> Tensor:
        """int32 [M, K, count]: the codes of a book whose entries are nearest to each code's."""
        codes = torch.zeros(self.codebook_size, self.num_books, dtype=torch.long, device=self.usage.device)
        found = list[Tensor]()
        for m in range(self.num_books):
            codes[:] = 0
            codes[:, m] = torch.arange(self.codebook_size, device=codes.device)
            found.append(neighbours(self.compared(self.decode(codes)), count))  # what other books add is the same for all
        return torch.stack(found)

    def compared(self, entries: Tensor) -> Tensor:
        """[n, dims] → [n, dims] in which distance decides."""
        return entries


class SharedIndexQuantizer(Quantizer):
    """M books of K shared-index entries. Tables are random until a start or training fills them."""

    def __init__(self, config: QuantizerConfig, text: TextEmbedding | None = None) -> None:
        super().__init__()
        self.config, self.num_books, self.codebook_size = config, config.num_books, config.codebook_size
        self.semantic_dims, self.pixel_dims = config.num_books * config.semantic_dim, config.pixel_dims
        self.dims = self.semantic_dims + sum(config.pixel_dims)
        kinds = {"free": FreeTable, "ema": EmaTable, "simvq": SimvqTable}

        def table(kind: Kind, dims: int) -> nn.Module | None:
            if dims == 0:
                return None
            if kind != "text":
                return kinds[kind](config.codebook_size, dims)
            if text is None:
                raise ValueError("a text table needs a text embedding to be made of: give one, or set quantizer.semantic_table to free")
            return TextTable(config.codebook_size, dims, text.rows, text.ids, text.width, config.phrase_len)

        # a part without dims has no table, and its place in the list is None
        self.semantic_tables: Any = nn.ModuleList(table(config.semantic_table, config.semantic_dim) for _ in range(self.num_books))  # pyright: ignore[reportArgumentType]
        self.pixel_tables: Any = nn.ModuleList(table(config.pixel_table, dims) for dims in config.pixel_dims)  # pyright: ignore[reportArgumentType]
        self.register_buffer("usage", torch.ones(self.num_books, config.codebook_size))
        self.text_checksum = text.checksum if text is not None else ""

    # Latents and entries ------------------------------------------------------------------------------------------

    @property
    def part_dims(self) -> tuple[int, int]:
        return self.semantic_dims, sum(self.pixel_dims)

    def parts(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        return entries[:, :self.semantic_dims], entries[:, self.semantic_dims:]

    def books(self, z: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[n, dims] → (semantic [n, ds], pixel [n, dp]) of each book, of unit length where the configuration says so."""
        semantic, pixel = self.parts(z.float())
        return [self._normal(s, p) for s, p in zip(semantic.split(self.config.semantic_dim, -1) if self.semantic_dims
                                                   else [semantic] * self.num_books, pixel.split(self.pixel_dims, -1), strict=True)]

    def _normal(self, semantic: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        return (F.normalize(semantic, dim=-1) if c.semantic_norm and semantic.shape[-1] else semantic,
                F.normalize(pixel, dim=-1) if c.pixel_norm and pixel.shape[-1] else pixel)

    def joint(self, book: int, semantic: Tensor, pixel: Tensor) -> Tensor:
        """[…, ds], […, dp] → […, ds + dp], in which distance decides."""
        a, b = self.config.weights(book)
        return torch.cat([a**0.5 * semantic, b**0.5 * pixel], -1)

    def rows(self, book: int, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Semantic [K, ds] and pixel entries [K, dp] of a book; of `codes` [n] alone if given."""
        count = self.codebook_size if codes is None else len(codes)
        semantic, pixel = (self.usage.new_zeros(count, 0) if table is None else table.rows(codes)
                           for table in (self.semantic_tables[book], self.pixel_tables[book]))
        return self._normal(semantic, pixel)

    def entries(self, book: int) -> Tensor:
        """[K, ds + dp] of a book, in the space where codes are compared."""
        return self.joint(book, *self.rows(book))

    def compared(self, entries: Tensor) -> Tensor:
        return torch.cat([self.joint(m, s, p) for m, (s, p) in enumerate(self.books(entries))], -1)

    def encode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            return torch.stack([nearest(self.joint(m, s, p), self.entries(m), self.config.gradient == "all")
                                for m, (s, p) in enumerate(self.books(z))], -1)

    def decode(self, codes: Tensor) -> Tensor:
        found = [self.rows(m, codes[:, m]) for m in range(self.num_books)]
        return torch.cat([s for s, _ in found] + [p for _, p in found], -1)

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            books, codes = self.books(z), self.encode(z)
            parts, squares, entropies = list[tuple[Tensor, Tensor]](), list[Tensor](), list[Tensor]()
            for m, (zs, zp) in enumerate(books):
                z_m, chosen = self.joint(m, zs, zp), codes[:, m]
                if self.config.gradient == "all":
                    part, square = self._all_rows(m, z_m, chosen)
                else:
                    part, square = self._straight_through(m, zs, zp, chosen)
                parts.append(part)
                squares.append(square)
                if self.training and (few := self.config.entropy_latents):
                    sure, used = sample_entropies(z_m[::max(1, len(z_m) // few)][:few], self.entries(m), self.config.entropy_temperature)
                    entropies.append(sure - used)
            losses = {"quantize": torch.stack(squares).sum() / self.dims}
            if entropies:
                losses["entropy"] = torch.stack(entropies).mean()
            if self.training:
                self.count(codes)
                self._follow(books, codes)
            return Quantized(torch.cat([s for s, _ in parts] + [p for _, p in parts], -1), codes, losses)

    def _straight_through(self, book: int, zs: Tensor, zp: Tensor, codes: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """→ parts for the readers, and the squared distance [] that pulls entries to latents and, less, latents to entries."""
        qs, qp = self.rows(book, codes)
        q, z = self.joint(book, qs, qp), self.joint(book, zs, zp)
        square = ((q - z.detach()).square() + self.config.commitment * (z - q.detach()).square()).sum(-1).mean()
        if self.config.gradient == "latent":
            qs, qp = qs.detach(), qp.detach()
        return (qs + (zs - zs.detach()), qp + (zp - zp.detach())), square

    def _all_rows(self, book: int, z: Tensor, codes: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The same for index backpropagation, whose loss has a third term, of the soft choice (IBQ, section 3.2)."""
        entries = self.entries(book)
        soft: Tensor = AllRows.apply(z, entries, codes)  # pyright: ignore[reportAssignmentType]
        hard = F.embedding(codes, entries)
        square = ((soft - z).square() + (hard.detach() - z).square()
                  + self.config.commitment * (hard - z.detach()).square()).sum(-1).mean()
        (a, b), ds = self.config.weights(book), self.config.semantic_dim
        return (soft[:, :ds] / a**0.5, soft[:, ds:] / b**0.5), square

    # Keeping every code alive -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _follow(self, books: list[tuple[Tensor, Tensor]], codes: Tensor) -> None:
        for m, latents in enumerate(books):
            for table, z in zip((self.semantic_tables[m], self.pixel_tables[m]), latents, strict=True):
                if isinstance(table, EmaTable):
                    table.follow(z, codes[:, m])

    @torch.no_grad()
    def revive(self, z: Tensor, below: float = 0.03, seed: int = 0) -> int:
        """Move codes used less than `below` of their fair share onto latents z [n, dims] of all ranks, those far from their entries
        first (drawn by squared distance, as k-means++ draws). A text table's code takes the phrase of the nearest living one. → how many"""
        generator, revived = torch.Generator().manual_seed(seed), 0
        for m, (zs, zp) in enumerate(self.books(z)):
            tables = self.semantic_tables[m], self.pixel_tables[m]
            dead = (self.usage[m] < below).nonzero().squeeze(-1)
            alive = (self.usage[m] >= below).nonzero().squeeze(-1)
            if not len(dead) or not len(alive) or not any(getattr(table, "movable", False) for table in tables):
                continue
            joint, entries = self.joint(m, zs, zp), self.entries(m)
            away = joined((joint - entries[nearest(joint, entries)]).square().sum(-1)).double().cpu()
            gumbel = -torch.empty_like(away).exponential_(generator=generator).log()
            picks = (away.clamp_min(1e-30).log() + gumbel).topk(min(len(dead), len(away))).indices.to(z.device)
            dead = dead[torch.randperm(len(dead), generator=generator)[:len(picks)].to(z.device)]
            at = rows_of_ranks(joint, picks)
            like = alive[nearest(at, entries[alive])]
            for table, values in zip(tables, (rows_of_ranks(zs, picks), rows_of_ranks(zp, picks)), strict=True):
                if isinstance(table, TextTable):
                    table.phrases[dead] = table.phrases[like]
                elif table is not None and table.movable:
                    table.put(dead, values)
            self.usage[m, dead] = 1.0
            revived += len(dead)
        return revived

    def words(self, book: int) -> Tensor | None:
        """[K, p] token ids that name each code, where the semantic table is made of text."""
        table = self.semantic_tables[book]
        return table.words() if isinstance(table, TextTable) else None

    @property
    def text(self) -> TextEmbedding | None:
        """What the semantic tables are made of, if they are of text, without the rows."""
        table = self.semantic_tables[0]
        return TextEmbedding(None, table.ids, len(table.projection), self.text_checksum) if isinstance(table, TextTable) else None

    def freeze(self) -> None:
        """Keep the rows of text tables as they are now, to be saved."""
        for table in self.semantic_tables:
            if isinstance(table, TextTable):
                table.freeze()
