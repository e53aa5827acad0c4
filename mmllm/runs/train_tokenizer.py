"""Train the visual tokenizer: the CLIP teacher first, then the codebook that is distilled from it.

    teacher   contrastive and word losses on pictures and captions
    start     closed-form latents, k-means of each book, semantic directions, phrases for the semantic table
    refine    gradient steps on everything but the tower, dead codes revived; kept only where validation is better

Letters: n pictures, b batch, T text pieces.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data import shards
from data.images import load_image, to_array, to_tensor
from mmllm.progress import Progress
from tokenizer.layers import LinearPatches, patches_of
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.quantize import kmeans, nearest
from tokenizer.semantic import Teacher
from tokenizer.text import TextTokenizer

Log = Callable[[int, int, dict[str, float]], None]
"""Called with step, steps and measures."""


@dataclass(frozen=True, kw_only=True)
class TeacherTraining:
    """Steps of the CLIP teacher."""

    steps: int = 400
    """Optimizer steps."""
    batch: int = 64
    """Pictures a step."""
    lr: float = 2e-3
    """Of AdamW; cosine to zero."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """Start and refinement of the codebook."""

    start_patches: int = 60_000
    """Patches that the start is fitted to."""
    kmeans_rounds: int = 15
    """Rounds of k-means."""
    steps: int = 100
    """Gradient steps after the start."""
    batch: int = 64
    """Pictures a step."""
    lr: float = 3e-4
    """Of AdamW; cosine to zero."""
    semantic_weight: float = 0.1
    """Weight of the distillation loss."""
    revive_every: int = 25
    """Steps between revivals of dead codes, in the first half."""
    validate_every: int = 25
    """Steps between validations; the best state is kept."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Everything `mmllm tokenizer train` needs to know."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    teacher: TeacherTraining = field(default_factory=TeacherTraining)
    tokenizer: TokenizerTraining = field(default_factory=TokenizerTraining)
    seed: int = 0
    """Of every draw."""



@dataclass(frozen=True, kw_only=True)
class TrainVisual:
    """Train teacher and visual tokenizer on the pairs of raw shards."""

    raw: Path
    """Folder of raw shards: train-*.tar to learn from, seen-*.tar to validate on."""
    text: Path
    """Text tokenizer, a text.model file."""
    out: Path
    """Folder for the visual tokenizer; teacher.safetensors is written beside it."""
    training: TrainTokenizer = field(default_factory=TrainTokenizer)
    """Sizes and steps."""


def main(recipe: TrainVisual) -> Path:
    """Teacher, then tokenizer. → `recipe.out`"""
    text = TextTokenizer.load(recipe.text)
    pictures, texts = pairs(recipe.raw, "train-")
    with Progress("teacher", "steps") as progress:
        teacher = train_teacher(pictures, texts, text, recipe.training, progress)
    teacher.save(recipe.out.parent / "teacher.safetensors")
    with Progress("tokenizer", "steps") as progress:
        model = train_tokenizer(pictures, texts, pairs(recipe.raw, "seen-")[0], teacher, text, recipe.training, progress)
    model.save(recipe.out)
    return recipe.out


def pairs(raw: Path, prefix: str) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures [n, H, W, 3] and texts of the documents that are one picture with one text."""
    pictures, texts = list[NDArray[np.uint8]](), list[str]()
    for document in shards.read_all(shards.find(raw, prefix)):
        images = [part for part in document.parts if isinstance(part, bytes)]
        words = [part for part in document.parts if isinstance(part, str)]
        if len(images) == len(words) == 1:
            pictures.append(to_array(load_image(images[0])))
            texts.append(words[0])
    if not pictures:
        raise ValueError(f"{raw}: no document of {prefix}*.tar is one picture with one text: there is nothing to train on")
    return np.stack(pictures), texts


class _Batches:
    """Batch `step` of an endless reshuffled pass over `count` samples; a pure function of the seed."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, min(batch, count), seed
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> NDArray[np.int64]:
        a_pass = self.count // self.batch
        epoch, at = divmod(step, a_pass)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self.order[at * self.batch:(at + 1) * self.batch]


def _cosine(step: int, steps: int, warmup: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_teacher(images: NDArray[np.uint8], texts: Sequence[str], text: TextTokenizer, recipe: TrainTokenizer,
                  log: Log = lambda step, steps, terms: None) -> Teacher:
    """images [n, H, W, 3] and their captions → a trained teacher, in eval mode."""
    torch.manual_seed(recipe.seed)
    training = recipe.teacher
    teacher = Teacher(recipe.model.tower, text.size)
    ids = teacher.text_batch([text.encode(t) for t in texts])
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=training.lr, betas=(0.9, 0.98), weight_decay=0.01)
    batches = _Batches(len(images), training.batch, recipe.seed)
    for step in range(training.steps):
        pick = batches(step)
        loss, terms = teacher(to_tensor(images[pick]), ids[torch.from_numpy(pick)])
        _check(loss, step, "teacher")
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = training.lr * _cosine(step, training.steps, 20)
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == training.steps:
            log(step + 1, training.steps, {k: v.item() for k, v in terms.items()})
    return teacher.eval().requires_grad_(False)


def usable_rows(texts: Sequence[Sequence[int]], size: int) -> Tensor:
    """Ids of the text pieces that occur, and not in nearly every text: the rows of the token embedding that mean something. [V]"""
    count = torch.zeros(size)
    for ids in texts:
        count[list(set(ids))] += 1
    return ((count > 0) & (count < 0.9 * len(texts))).nonzero().squeeze(-1)


def train_tokenizer(images: NDArray[np.uint8], texts: Sequence[str], held: NDArray[np.uint8], teacher: Teacher,
                    text: TextTokenizer, recipe: TrainTokenizer,
                    log: Log = lambda step, steps, terms: None) -> VisualTokenizer:
    """images [n, H, W, 3] with their captions to learn from, held [m, H, W, 3] to validate on. → in eval mode"""
    torch.manual_seed(recipe.seed)
    training = recipe.tokenizer
    ids = [text.encode(t) for t in texts]
    rows = usable_rows(ids, text.size)
    embedding = teacher.text.token_embedding.weight[rows].detach()
    embedding = embedding - embedding.mean(0)
    model = VisualTokenizer(recipe.model, embedding / embedding.norm(dim=-1).mean(), rows)
    model.semantic_tower.load_state_dict(teacher.visual.state_dict())
    start(model, images, ids, rows, recipe)
    batches = _Batches(len(images), training.batch, recipe.seed + 1)
    valid = to_tensor(held[:256])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=training.lr, betas=(0.9, 0.98),
                                  weight_decay=0.0)
    best, psnr = validate(model, valid, training.semantic_weight)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    log(0, training.steps, {"psnr": psnr})
    for step in range(training.steps):
        pick = to_tensor(images[batches(step)])
        model.train()
        out = model(pick, training.semantic_weight)
        _check(out.total, step, "tokenizer")
        optimizer.zero_grad()
        out.total.backward()
        for group in optimizer.param_groups:
            group["lr"] = training.lr * _cosine(step, training.steps, 20)
        optimizer.step()
        if (step + 1) % training.revive_every == 0 and step < training.steps // 2:
            model.quantizer.revive(model.patches(pick), seed=recipe.seed + step)
        if (step + 1) % training.validate_every == 0 or step + 1 == training.steps:
            loss, psnr = validate(model, valid, training.semantic_weight)
            log(step + 1, training.steps, {"psnr": psnr, **{k: v.item() for k, v in out.terms.items()}})
            if loss < best:
                best, kept = loss, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def start(model: VisualTokenizer, images: NDArray[np.uint8], texts: Sequence[Sequence[int]], rows: Tensor,
          recipe: TrainTokenizer) -> None:
    """Latents in closed form, then book by book: k-means on distinct pixel latents, the semantic directions in which the clusters
    differ, and each cluster's phrase: the caption tokens that its pictures have more often than others."""
    training, config, grid = recipe.tokenizer, recipe.model.quantizer, model.grid[0] * model.grid[1]
    sample = np.random.default_rng(recipe.seed).permutation(len(images))[:max(1, training.start_patches // grid)]
    pictures = to_tensor(images[sample])
    said = torch.zeros(len(sample), len(rows))
    place = {int(row): column for column, row in enumerate(rows)}
    for line, number in zip(said, sample, strict=True):
        line[[place[i] for i in texts[number] if i in place]] = 1
    said = (said - said.mean(0)).repeat_interleave(grid, 0)  # [n, V]
    if isinstance(model.patches, LinearPatches):
        model.patches.start(patches_of(pictures, recipe.model.tower.patch_size))
    features = torch.cat([model.features(part) for part in pictures.split(256)])  # [n, c]
    pixel = torch.cat([model.patches(part) for part in pictures.split(256)]).split(config.pixel_dims, -1)
    for book, latents in enumerate(pixel):
        # plain ground is most of every picture and one code to learn: distinct latents, each weighted by √count
        _, first, count = np.unique((latents * 64).round().to(torch.int16).numpy(), axis=0, return_index=True,
                                    return_counts=True)
        entries = kmeans(latents[first], torch.from_numpy(count).float().sqrt(), config.codebook_size,
                         training.kmeans_rounds, recipe.seed + book)
        index = nearest(latents, entries)
        size = torch.bincount(index, minlength=len(entries)).clamp_min(1)[:, None]
        mean = torch.zeros(len(entries), features.shape[1]).index_add_(0, index, features) / size
        lift = torch.zeros(len(entries), len(rows)).index_add_(0, index, said) / size
        part = slice(book * config.semantic_dim, (book + 1) * config.semantic_dim)
        weight, bias = principal(mean, config.semantic_dim)
        model.semantic_in.weight[part], model.semantic_in.bias[part] = weight, bias
        model.quantizer.start(book, entries, lift.topk(config.phrase_len).indices,
                              F.normalize(mean @ weight.T + bias, dim=-1))


def principal(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """x [n, c] → weight [dims, c] and bias [dims] of the map to its principal directions, half whitened."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean) / len(x)).double())
    scale = values.flip(-1)[:dims].clamp_min(1e-9) ** -0.25
    weight = (vectors.flip(-1)[:, :dims] * scale).T.float()
    return weight, -weight @ mean


@torch.no_grad()
def validate(model: VisualTokenizer, images: Tensor, semantic_weight: float) -> tuple[float, float]:
    """→ training loss, and PSNR in dB over all pixels, of pictures in [-1, 1]."""
    model.eval()
    out = model(images, semantic_weight)
    error = F.mse_loss(out.images.clamp(-1, 1), images).item()
    return out.total.item(), 10 * math.log10(4 / max(error, 1e-12))


def _check(loss: Tensor, step: int, what: str) -> None:
    if not torch.isfinite(loss):
        raise ValueError(f"{what} training: the loss is {loss.item()} at step {step}; lower its learning rate")
