"""Train the CLIP teacher that a quick start's tokenizer is distilled from; on a cluster a pretrained tower takes its place."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data.images import to_tensor
from data.pairs import Pairs, batches
from tokenizer.semantic import Teacher, TowerConfig
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


def train_teacher(pairs: Pairs, text: TextTokenizer, tower: TowerConfig, training: TeacherTraining, seed: int = 0,
                  log: Log = lambda step, steps, terms: None) -> Teacher:
    """→ a trained teacher, in eval mode."""
    torch.manual_seed(seed)
    teacher = Teacher(tower, text.size)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=training.lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step, numbers in zip(range(training.steps), batches(pairs.groups, training.batch, seed), strict=False):
        batch = pairs.batch(numbers)
        loss, terms = teacher(to_tensor(batch.pictures), teacher.text_batch(text.encode_all(batch.texts)))
        if not torch.isfinite(loss):
            raise ValueError(f"teacher training: the loss is {loss.item()} at step {step}: lower teacher.lr {training.lr}")
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = training.lr * cosine(step, training.steps, 20)
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == training.steps:
            log(step + 1, training.steps, {k: v.item() for k, v in terms.items()})
    return teacher.eval().requires_grad_(False)


def cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Linear warmup times a cosine from 1 to `floor`."""
    return min(1.0, (step + 1) / max(1, warmup)) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
