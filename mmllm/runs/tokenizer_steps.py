"""The steps of one stage of a visual tokenizer's training, on each rank.

Whatever a step draws (pictures, scale, perturbation, augmentation) is a function of seed, step and rank, so there is no random state to
save. Two losses pull on the pixel decoder's picture, reconstruction and the discriminator's; both gradients are taken there, and one
backward pass carries their weighted sum on.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
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
from data.pairs import Batch, Pairs, batches
from mmllm import sharded
from mmllm.manifest import read_state
from mmllm.run import Log, StopOnSignal, resident_bytes, resolve_precision
from mmllm.runs.tokenizer_recipe import Stage, TrainTokenizer, recipe_hash
from mmllm.runs.train_teacher import cosine
from tokenizer.adversarial import LeCam, adaptive_weight, discriminator_hinge, gan_weight, generator_hinge
from tokenizer.balance import Balance, BalanceConfig
from tokenizer.discriminator import FeatureDiscriminator, PatchDiscriminator, augment
from tokenizer.ema import Average
from tokenizer.objective import Objective
from tokenizer.perturb import perturb_codes
from tokenizer.quantize import SharedIndexQuantizer
from tokenizer.ranks import rank, sum_over_ranks
from tokenizer.residual import ResidualQuantizer
from tokenizer.towers import Tower

VALIDATED = 256
"""Held pictures that validation looks at."""


@dataclass(frozen=True)
class Run:
    """One stage and what it works on."""

    training: TrainTokenizer
    name: str
    """align or decode"""
    stage: Stage
    objective: Objective
    pairs: Pairs
    held: Pairs
    checkpoints: Path
    before: int
    """Steps of the stages before."""
    total: int
    """Steps of all stages."""
    device: torch.device


@dataclass
class Parts:
    """What learns; all of it is in a checkpoint."""

    objective: nn.Module
    """as it is called: wrapped by DDP, sharded by FSDP2, or plain"""
    optimizer: torch.optim.Optimizer
    discriminator: nn.Module | None
    critic: torch.optim.Optimizer | None
    """the discriminator's optimizer"""
    lecam: LeCam
    balance: Balance | None
    average: Average | None
    best: dict[str, Tensor] | None = None
    best_loss: float = float("inf")


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
            sharded.save(run.checkpoints, done, everything(run, parts), {"stage": run.name, "step": done, "best_loss": parts.best_loss,
                                                                         "recipe": recipe_hash(training)}, training.keep_last)
        if stopping and done < run.total:
            if log is not None:
                log.say(f"told to stop: saved step {done}, the same command continues")
            return False
    end(run, parts)
    return True


def hash_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# What learns ------------------------------------------------------------------------------------------------------

def make_parts(run: Run) -> Parts:
    """Freeze what the stage leaves alone, wrap what trains, and give it an optimizer."""
    training, stage, objective = run.training, run.stage, run.objective
    freeze(run)
    if training.ranks > 1 and run.name == "align":
        freeze_unused(run)
    wrapped = wrap(objective, training)
    gan, discriminator, critic = stage.gan, None, None
    if gan.weight:
        torch.manual_seed(hash_of(training.seed, 1))  # the same on all ranks
        if gan.kind == "patch":
            discriminator = PatchDiscriminator(gan.channels, gan.layers).to(run.device)
        else:
            tower = Tower.load(gan.tower).to(run.device)
            discriminator = FeatureDiscriminator(tower.hidden, [tower.width] * 4).to(run.device)
        critic = torch.optim.AdamW(discriminator.parameters(), lr=gan.lr, betas=gan.betas, weight_decay=0.0)
        if training.ranks > 1:
            discriminator = DistributedDataParallel(discriminator, broadcast_buffers=False)
    balance = None
    if training.balance_steps and run.name == "align":
        ratios = {name: 1.0 for name in ("semantic", "contrastive") if getattr(stage.weights, name)}
        balance = Balance(BalanceConfig(ratios=ratios, every=training.balance_every, warmup_steps=training.balance_steps)).to(run.device)
    optimizer = torch.optim.AdamW(groups(objective, stage), lr=stage.lr, betas=stage.betas)
    average = Average(objective.tokenizer, training.average) if training.average and run.name == run_last(training) else None
    return Parts(wrapped, optimizer, discriminator, critic, LeCam().to(run.device), balance, average)


def run_last(training: TrainTokenizer) -> str:
    return "decode" if training.decode.steps else "align"


def freeze(run: Run) -> None:
    """Decode trains the pixel decoder alone; align everything that its losses reach."""
    objective, weights = run.objective, run.stage.weights
    tokenizer = objective.tokenizer
    objective.requires_grad_(run.name == "align")
    objective.train()
    if run.name == "decode":
        tokenizer.quantizer.eval()  # its tables do not follow any more
        tokenizer.pixel.decoder.requires_grad_(True)
        if tokenizer.scale_embedding is not None:
            tokenizer.scale_embedding.requires_grad_(True)
        return
    tokenizer.semantic_tower.requires_grad_(run.training.model.train_tower)
    tokenizer.semantic_out.requires_grad_(weights.semantic > 0)
    if objective.contrast is not None:
        objective.contrast.requires_grad_(weights.contrastive > 0)
    if not run.training.model.train_tower:
        tokenizer.semantic_tower.eval()


def freeze_unused(run: Run) -> None:
    """Take what no loss reaches, such as a tower's pooling head, out of training: DDP waits for the gradient of every parameter."""
    objective, pictures = run.objective, run.pairs.batch([0, 1])
    objective.tokenizer.quantizer.eval()
    texts = objective.contrast.text.tokenize(pictures.texts).to(run.device) if objective.contrast is not None else None
    losses = objective(to_tensor(pictures.pictures).to(run.device), run.stage.weights, texts, run.training.model.scales[-1]).losses
    torch.stack([loss for name, loss in losses.items() if getattr(run.stage.weights, name)]).sum().backward()
    for parameter in objective.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    objective.zero_grad()
    objective.tokenizer.quantizer.train()


def wrap(objective: Objective, training: TrainTokenizer) -> nn.Module:
    if training.ranks == 1 or not any(p.requires_grad for p in objective.parameters()):
        return objective
    if training.sharded:
        return sharded.shard(objective, set(whole(objective)))
    return DistributedDataParallel(objective, broadcast_buffers=False)


def whole(objective: Objective) -> list[nn.Parameter]:
    """Parameters that every rank holds whole under FSDP2: tables, which are looked up and moved by index, and scalars."""
    return [*objective.tokenizer.quantizer.parameters(), *(p for p in objective.parameters() if p.ndim == 0)]


def groups(objective: Objective, stage: Stage) -> list[dict[str, Any]]:
    """Matrices with decay; norms and biases, and tables, without; pretrained towers at their own rate."""
    tokenizer = objective.tokenizer
    tables = set(whole(objective))
    towers = set(tokenizer.semantic_tower.parameters()) | (set(objective.contrast.text.parameters()) if objective.contrast else set())
    found: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for parameter in objective.parameters():
        if parameter.requires_grad:
            table, tower = parameter in tables, parameter in towers
            found.setdefault((table, tower, parameter.ndim >= 2 and not table), []).append(parameter)
    return [{"params": parameters, "weight_decay": stage.weight_decay if decays else 0.0, "ratio": stage.tower_lr if tower else 1.0}
            for (_, tower, decays), parameters in found.items()]


def everything(run: Run, parts: Parts) -> dict[str, Any]:
    """What a checkpoint holds."""
    modules = {"objective": run.objective, "optimizer": parts.optimizer, "discriminator": parts.discriminator, "critic": parts.critic,
               "lecam": parts.lecam, "balance": parts.balance, "average": parts.average}
    return {**{name: part.state_dict() for name, part in modules.items() if part is not None}, "best": parts.best}


def restore(run: Run, parts: Parts, saved: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Go on from a checkpoint of this stage. Errors: ValueError where another recipe wrote it."""
    if numbers["recipe"] != recipe_hash(run.training):
        raise ValueError(f"{run.checkpoints} holds checkpoints of another recipe: choose another `out`, or remove the folder")
    sharded.put(run.objective.state_dict(), saved["objective"])
    sharded.put_optimizer(parts.optimizer, saved["optimizer"])
    parts.lecam.load_state_dict(saved["lecam"])
    if parts.discriminator is not None and parts.critic is not None:
        parts.discriminator.load_state_dict(saved["discriminator"])
        parts.critic.load_state_dict(saved["critic"])
    if parts.balance is not None:
        parts.balance.load_state_dict(saved["balance"])
    if parts.average is not None:
        tensors = {name: sharded.placed(value, parts.average.tensors[name]) for name, value in saved["average"]["tensors"].items()}
        parts.average.load_state_dict({**saved["average"], "tensors": tensors})
    if saved["best"] is not None:
        like = run.objective.tokenizer.state_dict()
        parts.best = {name: sharded.placed(value, like[name]) for name, value in saved["best"].items()}
        parts.best_loss = numbers["best_loss"]


def end(run: Run, parts: Parts) -> None:
    """Leave the weights that the next stage, or saving, takes."""
    tokenizer = run.objective.tokenizer
    if parts.average is not None:
        parts.average.copy_to(tokenizer)
    elif parts.best is not None:
        sharded.put(tokenizer.state_dict(), parts.best)


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
        generator = torch.Generator().manual_seed(hash_of(training.seed, step, rank(), number))
        texts = run.objective.contrast.text.tokenize(micro.texts).to(run.device) if run.objective.contrast is not None else None
        with synced(parts.objective, last):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=resolve_precision(training.precision) is torch.bfloat16):
                losses, reading = parts.objective(images, stage.weights, texts, scale, perturbation(run, at, neighbours, generator))
            picture, rest = weighed(run, parts, losses, reading.entries, at)
            if weight and parts.discriminator is not None:
                loss = rest + pulled(parts.discriminator, picture, reading.images, weight, losses, generator if stage.gan.augment else None)
            else:
                loss = rest + picture
            (loss / len(micros)).backward()
        if weight and parts.discriminator is not None:
            with synced(parts.discriminator, last):
                judged = judge(parts, images, reading.images.detach(), losses, stage.gan.lecam, generator if stage.gan.augment else None)
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
        if at < run.training.balance_steps and at % run.training.balance_every == 0:
            parts.balance.measure({"reconstruction": picture, **{name: each[name] for name in parts.balance.names[1:]}}, [entries])
        factors = parts.balance.weights()
        each = {name: loss * factors.get(name, 1.0) for name, loss in each.items()}
    return picture, sum(each.values(), zero)


def pulled(discriminator: nn.Module, picture: Tensor, images: Tensor, weight: float, losses: dict[str, Tensor],
           generator: torch.Generator | None) -> Tensor:
    """A scalar whose gradient at `images` is that of `picture` and, as strong at the picture times `weight`, the discriminator's."""
    plain = discriminator.module if isinstance(discriminator, DistributedDataParallel) else discriminator
    (rebuild,) = torch.autograd.grad(picture, images, retain_graph=True)
    leaf = images.detach().requires_grad_()
    hinge = generator_hinge(plain(augment(leaf, generator) if generator else leaf))
    (persuade,) = torch.autograd.grad(hinge, leaf)
    factor = adaptive_weight(rebuild, persuade)
    losses["generator"], losses["adaptive"] = hinge, factor
    return (images * (rebuild + weight * factor * persuade).detach()).sum()


def judge(parts: Parts, images: Tensor, rebuilt: Tensor, losses: dict[str, Tensor], lecam: float,
          generator: torch.Generator | None) -> Tensor:
    """The discriminator's loss on pictures and their reconstructions."""
    assert parts.discriminator is not None
    both = torch.cat([images, rebuilt.to(images.dtype)])
    real, fake = parts.discriminator(augment(both, generator) if generator else both).chunk(2)
    losses["discriminator"] = discriminator_hinge(real, fake)
    losses["lecam"] = parts.lecam(real, fake)
    return losses["discriminator"] + lecam * losses["lecam"]


def perturbation(run: Run, at: int, neighbours: Tensor | None, generator: torch.Generator) -> Callable[[Tensor], Tensor] | None:
    settings = run.stage.perturb
    if neighbours is None:
        return None
    alpha = settings.alpha[0] + (settings.alpha[1] - settings.alpha[0]) * at / max(1, run.stage.steps - 1)
    return lambda codes: perturb_codes(codes, neighbours, alpha, settings.beta, generator)


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
