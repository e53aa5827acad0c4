"""What a codebook starts from, before the first gradient step: k-means over latents of real pictures.

Closed-form patches have their final latents already, so their books start nearly trained: k-means on distinct pixel latents, the semantic
directions in which the clusters differ, and, where rows are text, each cluster's phrase, the caption tokens that its pictures have more
often than others. An encoder that is still to be trained gives random latents: its movable tables start on them, so no code is dead
birth.

Each rank brings pictures of its own. Letters: n pictures, p = n · gh · gw positions, V usable text rows, c tower width, ds semantic dims.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.kmeans import kmeans
from tokenizer.layers import ClosedPixels, LinearPatches, from_grid, patches_of
from tokenizer.model import VisualTokenizer
from tokenizer.nearest import nearest
from tokenizer.quantize import SharedIndexQuantizer
from tokenizer.ranks import sum_over_ranks
from tokenizer.residual import ResidualQuantizer
from tokenizer.tables import TextTable

BATCH = 256


@torch.no_grad()
def start(model: VisualTokenizer, images: Tensor, said: Tensor | None = None, rounds: int = 15, seed: int = 0) -> None:
    """images [n, 3, H, W] in [-1, 1]; said [n, V]: which usable text rows each picture's caption holds, needed for phrases."""
    quantizer = model.quantizer
    if isinstance(model.pixel, ClosedPixels):
        _closed(model, model.pixel, images, said, rounds, seed)
    elif isinstance(quantizer, ResidualQuantizer):
        z = _latents(model, images)
        quantizer.table.put(torch.arange(quantizer.codebook_size, device=z.device),
                            kmeans(z, torch.ones(len(z), device=z.device), quantizer.codebook_size, rounds, seed))
    elif isinstance(quantizer, SharedIndexQuantizer):
        for m, (zs, zp) in enumerate(quantizer.books(_latents(model, images))):
            centres = kmeans(torch.cat([zs, zp], -1), torch.ones(len(zs), device=zs.device), quantizer.codebook_size, rounds, seed + m)
            _put(quantizer, m, *centres.split([zs.shape[1], zp.shape[1]], -1))


def _latents(model: VisualTokenizer, images: Tensor) -> Tensor:
    return torch.cat([model.latents(part, model.features(part)).float() for part in images.split(BATCH)])


def _put(quantizer: SharedIndexQuantizer, book: int, semantic: Tensor, pixel: Tensor) -> None:
    every = torch.arange(quantizer.codebook_size, device=pixel.device)
    for table, values in ((quantizer.semantic_tables[book], semantic), (quantizer.pixel_tables[book], pixel)):
        if table is not None and table.movable:
            table.put(every, values)


def _closed(model: VisualTokenizer, branch: ClosedPixels, images: Tensor, said: Tensor | None, rounds: int, seed: int) -> None:
    quantizer, config = model.quantizer, model.config.quantizer
    assert isinstance(quantizer, SharedIndexQuantizer) and isinstance(model.semantic_in, torch.nn.Linear)
    if isinstance(branch.patches, LinearPatches):
        branch.patches.start(patches_of(images, model.patch_size))
    features = torch.cat([model.features(part) for part in images.split(BATCH)]).float()  # [p, c]
    pixel = torch.cat([from_grid(branch.encode(part)) for part in images.split(BATCH)]).split(config.pixel_dims, -1)
    if said is not None:
        said = (said - sum_over_ranks(said.sum(0)) / sum_over_ranks(torch.tensor(float(len(said)), device=said.device)))
        said = said.repeat_interleave(len(features) // len(images), 0)  # [p, V]
    for book, latents in enumerate(pixel):
        # plain ground is most of every picture and one code to learn: distinct latents, each weighted by √count
        distinct, inverse, count = torch.unique((latents * 64).round().to(torch.int16), dim=0, return_inverse=True, return_counts=True)
        first = torch.full((len(distinct),), len(latents), device=latents.device)
        first.scatter_reduce_(0, inverse, torch.arange(len(latents), device=latents.device), "amin")
        entries = kmeans(latents[first], count.float().sqrt(), config.codebook_size, rounds, seed + book)
        index = nearest(latents, entries)
        mean, size = _by_code(features, index, len(entries))
        part = slice(book * config.semantic_dim, (book + 1) * config.semantic_dim)
        weight, bias = principal(mean, config.semantic_dim)
        model.semantic_in.weight[part], model.semantic_in.bias[part] = weight, bias
        target = F.normalize(mean @ weight.T + bias, dim=-1)
        _put(quantizer, book, target, entries)
        table = quantizer.semantic_tables[book]
        if isinstance(table, TextTable):
            assert said is not None, "phrases are found by captions"
            lift = sum_over_ranks(torch.zeros(len(entries), said.shape[1], device=said.device).index_add_(0, index, said)) / size
            table.fit(lift.topk(config.phrase_len).indices, target)


def _by_code(x: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means [count, d] of x [p, d] by index [p], and how many of each [count, 1]; over all ranks."""
    size = sum_over_ranks(torch.bincount(index, minlength=count).float())[:, None].clamp_min(1)
    return sum_over_ranks(torch.zeros(count, x.shape[1], device=x.device).index_add_(0, index, x)) / size, size


def principal(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """x [n, c] → weight [dims, c] and bias [dims] of the map to its principal directions, half whitened."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean) / len(x)).double())
    scale = values.flip(-1)[:dims].clamp_min(1e-9) ** -0.25
    weight = (vectors.flip(-1)[:, :dims] * scale).T.float()
    return weight, -weight @ mean
