"""The steps of one stage of a visual tokenizer's training, on each rank.

Whatever a step draws (pictures and scale; for each picture, perturbation and augmentation) is a function of seed, step and the picture's
place in the step: there is no random state to save, and any number of ranks draws the same. Two losses pull on the pixel decoder's picture,
reconstruction and the discriminator's; both gradients are taken there, and one backward pass carries their weighted sum on.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.images import to_tensor
from data.pairs import Batch, batches
from mmllm import sharded
from mmllm.manifest import read_state
from mmllm.run import Log, StopOnSignal, resident_bytes, resolve_precision
from mmllm.runs.tokenizer_parts import Parts, Run, end, everything, hash_of, made_of, make_parts, restore, tokenized, whole
from mmllm.runs.tokenizer_recipe import TrainTokenizer
from mmllm.runs.train_teacher import cosine
from tokenizer.adversarial import adaptive_weight, discriminator_hinge, gan_weight, generator_hinge
from tokenizer.discriminator import DRAWS, augment
from tokenizer.objective import Objective
from tokenizer.perturb import perturb_codes
from tokenizer.quantize import SharedIndexQuantizer
from tokenizer.ranks import rank, sum_over_ranks
from tokenizer.residual import ResidualQuantizer

VALIDATED = 256
"""Held pictures that validation looks at."""


def run_stage(run: Run, first: int, resumed: Path | None, stop: StopOnSignal, log: Log | None) -> bool:
    """From step `first` of the whole run (or the stage's own first) to the stage's last. → False where it was told to stop before."""
    training, stage, objective = run.training, run.stage, run.objective
    parts = make_parts(run)
    if resumed is not None:
        restore(run, parts, sharded.read(resumed), read_state(resumed))
    first = max(first, run.before)
    held = to_tensor(run.held.batch(np.flatnonzero(run.held.groups == run.held.groups[0])[:VALIDATED]).pictures)
    if resumed is None and run.name == "align" and training.keep_best:
        remember(run, parts, validate(run, parts, held)["validation"])
    neighbours = objective.tokenizer.quantizer.neighbours(stage.perturb.neighbours) if stage.perturb.beta else None
    clock, since = perf_counter(), 0
    for step, micros in zip(range(first, run.before + stage.steps), read_ahead(run, first), strict=False):
        at = step - run.before
        torch.manual_seed(hash_of(training.seed, step, rank()))
        factor = cosine(at, stage.steps, stage.warmup_steps, stage.min_lr_ratio)
        for group in parts.optimizer.param_groups:
            group["lr"] = stage.lr * factor * group["ratio"]
        terms = step_on(run, parts, micros, at, step, neighbours)
        bad = [name for name, value in terms.items() if not abs(value) < float("inf")]
        if bad:
            keys = [key for micro in micros for key in micro.keys]
            raise FloatingPointError(f"tokenizer training: {', '.join(bad)} is not finite at step {step}, rank {rank()}; its samples are "
                                     f"{', '.join(keys[:8])}{' and more' if len(keys) > 8 else ''}: lower {run.name}.lr {stage.lr}")
        done, last = step + 1, step + 1 == run.before + stage.steps
        since += 1
        measured = validate(run, parts, held) if done % training.validate_every == 0 or last else {}
        if measured and training.keep_best and run.name == "align":
            remember(run, parts, measured["validation"])
        if log is not None and (done % training.log_every == 0 or last):
            now = perf_counter()
            log.record({"step": done, "stage": run.name, **terms, **measured, "lr": stage.lr * factor, **usage(objective),
                        "images_per_s": since * training.batch / (now - clock), "memory_bytes": resident_bytes()})
            clock, since = now, 0
        stopping = stop.asked()
        if stopping or (training.save_every and done % training.save_every == 0 and done < run.total):
            numbers = {"stage": run.name, "step": done, "best_loss": parts.best_loss, **made_of(training, objective.tokenizer)}
            sharded.save(run.checkpoints, done, everything(run, parts), numbers, training.keep_last)
        if stopping and done < run.total:
            if log is not None:
                log.say(f"told to stop: saved step {done}, the same command continues")
            return False
    end(run, parts)
    return True


# One step ---------------------------------------------------------------------------------------------------------

def step_on(run: Run, parts: Parts, micros: list[Batch], at: int, step: int, neighbours: Tensor | None) -> dict[str, float]:
    """Forward, backward and both optimizers. → the mean of each term over the batch."""
    training, stage = run.training, run.stage
    scale = drawn_scale(training, step)
    weight = gan_weight(at, stage.gan.start, stage.gan.warmup_steps, stage.gan.weight) if stage.gan.weight else 0.0
    seen = list[dict[str, Tensor]]()
    latents = None
    for number, micro in enumerate(micros):
        images, last = to_tensor(micro.pictures).to(run.device), number + 1 == len(micros)
        first = (number * training.ranks + rank()) * training.micro_batch  # place in the step, as `read_ahead` shares them out
        draws = [torch.Generator().manual_seed(hash_of(training.seed, 5, step, first + n)) for n in range(len(images))]
        with synced(parts.objective, last):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=resolve_precision(training.precision) is torch.bfloat16):
                losses, reading = parts.objective(images, stage.weights, tokenized(run, micro.texts), scale,
                                                  perturbation(run, at, neighbours, draws))
            picture, rest = weighed(run, parts, losses, reading.entries, at)
            if weight and parts.discriminator is not None:
                loss = rest + pulled(parts.discriminator, picture, reading.images, weight, losses, draws if stage.gan.augment else [])
            else:
                loss = rest + picture
            (loss / len(micros)).backward()
        if weight and parts.discriminator is not None:
            with synced(parts.discriminator, last):
                judged = judge(parts, images, reading.images.detach(), losses, stage.gan.lecam, draws if stage.gan.augment else [])
                (judged / len(micros)).backward()
        latents = reading.latents
        seen.append({name: value.detach() for name, value in losses.items()})
    if training.sharded and training.ranks > 1:
        sharded.mean_gradients(whole(run.objective))
    norm = sharded.clip(parts.optimizer, stage.clip_grad)
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    if weight and parts.critic is not None:
        parts.critic.step()
        parts.critic.zero_grad()
    if parts.average is not None:
        parts.average.update(run.objective.tokenizer)
    if run.name == "align" and (step + 1) % training.revive_every == 0 and at < stage.steps // 2 and latents is not None:
        revive(run, latents, step)
    means = {name: torch.stack([one[name] for one in seen]).mean() for name in seen[0]}
    together = sum_over_ranks(torch.stack(list(means.values())).float()) / training.ranks
    weights = parts.balance.weights() if parts.balance is not None else {}
    return {**dict(zip(means, together.tolist(), strict=True)), "grad_norm": norm,
            **{f"weight/{name}": value for name, value in weights.items() if name != "reconstruction"}}


def weighed(run: Run, parts: Parts, losses: dict[str, Tensor], entries: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """→ what is asked of the picture, and the rest, weighted; where the recipe says so, balanced by gradient norms at the quantizer's
    output."""
    each = {name: getattr(run.stage.weights, name) * loss for name, loss in losses.items()}
    zero = torch.zeros((), device=entries.device)
    picture = sum((each.pop(name) for name in ("l1", "l2", "perceptual") if name in each), zero)
    if parts.balance is not None:
        parts.balance.observe({"reconstruction": picture, **{name: each[name] for name in parts.balance.names[1:]}}, [entries], at)
        factors = parts.balance.weights()
        each = {name: loss * factors.get(name, 1.0) for name, loss in each.items()}
    return picture, sum(each.values(), zero)


def pulled(discriminator: nn.Module, picture: Tensor, images: Tensor, weight: float, losses: dict[str, Tensor],
           draws: list[torch.Generator]) -> Tensor:
    """A scalar whose gradient at `images` is that of `picture` and, as strong at the picture times `weight`, the discriminator's."""
    plain = discriminator.module if isinstance(discriminator, DistributedDataParallel) else discriminator
    (rebuild,) = torch.autograd.grad(picture, images, retain_graph=True)
    leaf = images.detach().requires_grad_()
    hinge = generator_hinge(plain(augmented(leaf, draws)))
    (persuade,) = torch.autograd.grad(hinge, leaf)
    factor = adaptive_weight(rebuild, persuade)
    losses["generator"], losses["adaptive"] = hinge, factor
    return (images * (rebuild + weight * factor * persuade).detach()).sum()


def judge(parts: Parts, images: Tensor, rebuilt: Tensor, losses: dict[str, Tensor], lecam: float,
          draws: list[torch.Generator]) -> Tensor:
    """The discriminator's loss on pictures and their reconstructions."""
    assert parts.discriminator is not None
    both = torch.cat([images, rebuilt.to(images.dtype)])
    real, fake = parts.discriminator(augmented(both, draws * 2)).chunk(2)
    losses["discriminator"] = discriminator_hinge(real, fake)
    losses["lecam"] = parts.lecam(real, fake)
    return losses["discriminator"] + lecam * losses["lecam"]


def augmented(images: Tensor, draws: list[torch.Generator]) -> Tensor:
    """By a generator a picture; as they are without any."""
    return augment(images, torch.stack([torch.rand(DRAWS, generator=own) for own in draws])) if draws else images


def perturbation(run: Run, at: int, neighbours: Tensor | None, draws: list[torch.Generator]) -> Callable[[Tensor], Tensor] | None:
    settings = run.stage.perturb
    if neighbours is None:
        return None
    alpha = settings.alpha[0] + (settings.alpha[1] - settings.alpha[0]) * at / max(1, run.stage.steps - 1)
    return lambda codes: perturb_codes(codes, neighbours, alpha, settings.beta, draws)


def synced(module: nn.Module, last: bool) -> Any:
    """Gradients are averaged over ranks at the last of a step's micro-batches alone."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


def revive(run: Run, latents: Tensor, step: int) -> None:
    quantizer = run.objective.tokenizer.quantizer
    if isinstance(quantizer, (SharedIndexQuantizer, ResidualQuantizer)):
        quantizer.revive(latents.detach(), run.training.revive_below, hash_of(run.training.seed, 3, step))


# Pictures in, measures out ----------------------------------------------------------------------------------------

def read_ahead(run: Run, first: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches of step `first`, `first` + 1, …: a step's pictures are shared out in order."""
    training = run.training

    def read(numbers: NDArray[np.int64]) -> list[Batch]:
        mine = numbers.reshape(-1, training.ranks, training.micro_batch)[:, rank()]
        return [run.pairs.batch(some) for some in mine]

    steps = batches(run.pairs.groups, training.batch, hash_of(training.seed, 4), first)
    if not training.workers:
        yield from map(read, steps)
        return
    with ThreadPoolExecutor(training.workers) as pool:
        waiting = deque(pool.submit(read, next(steps)) for _ in range(2 * training.workers))
        while True:
            yield waiting.popleft().result()
            waiting.append(pool.submit(read, next(steps)))


@torch.no_grad()
def validate(run: Run, parts: Parts, images: Tensor) -> dict[str, float]:
    """Held pictures [n, 3, H, W] at scale 1 → the stage's loss without adversary and contrast, PSNR in dB over all pixels of pictures in
    [-1, 1], cosine to the teacher."""
    objective, training = run.objective, run.objective.training
    objective.eval()
    losses, squares, count = list[dict[str, Tensor]](), torch.zeros((), device=run.device), 0
    for part in images.split(run.training.micro_batch):
        part = part.to(run.device)
        found, reading = objective(part, run.stage.weights)
        losses.append({name: value * len(part) for name, value in found.items()})
        squares += F.mse_loss(reading.images.float().clamp(-1, 1), part) * len(part)
        count += len(part)
    sharded.settle(objective)
    objective.train(training)
    if not run.training.model.train_tower:
        objective.tokenizer.semantic_tower.eval()
    if run.name == "decode":
        objective.tokenizer.quantizer.eval()
    means = {name: torch.stack([one[name] for one in losses]).sum().item() / count for name in losses[0]}
    total = sum(getattr(run.stage.weights, name) * value for name, value in means.items())
    cosine_of = {"cosine": 1 - means["semantic"]} if "semantic" in means else {}
    return {"validation": total, "psnr": (10 * torch.log10(4 / (squares / count).clamp_min(1e-12))).item(), **cosine_of}


def remember(run: Run, parts: Parts, loss: float) -> None:
    if loss < parts.best_loss:
        parts.best_loss = loss
        parts.best = {name: value.detach().clone() for name, value in run.objective.tokenizer.state_dict().items()}


def usage(objective: Objective) -> dict[str, float]:
    """Of the books together: share of codes with more than a thirtieth of their fair share of late, mean perplexity over K."""
    quantizer = objective.tokenizer.quantizer
    perplexity = quantizer.perplexity()
    return {"usage": (quantizer.usage > 1 / 30).float().mean().item(),
            "perplexity": sum(perplexity) / len(perplexity) / quantizer.codebook_size}


def drawn_scale(training: TrainTokenizer, step: int) -> int:
    """The scale of a step, on all ranks."""
    scales = training.model.scales
    odds = np.array(training.scale_odds or [1.0] * len(scales))
    return int(np.random.default_rng((training.seed, 2, step)).choice(scales, p=odds / odds.sum()))
