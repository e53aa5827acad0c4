"""What learns in a stage of a visual tokenizer's training: frozen, wrapped, given optimizers, saved and restored.

A checkpoint of a stage holds all of `Parts`; what a stage draws is a function of seed and step (mmllm/runs/tokenizer_steps.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.images import to_tensor
from data.pairs import Pairs
from mmllm import sharded
from mmllm.manifest import read_state
from mmllm.runs.tokenizer_recipe import Stage, TrainTokenizer, recipe_hash
from tokenizer.adversarial import LeCam
from tokenizer.balance import Balance, BalanceConfig
from tokenizer.discriminator import FeatureDiscriminator, PatchDiscriminator
from tokenizer.ema import Average
from tokenizer.model import VisualTokenizer
from tokenizer.objective import Objective
from tokenizer.towers import Tower


def hash_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


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
    objective, groups = run.objective, run.pairs.groups
    pictures = run.pairs.batch(np.flatnonzero(groups == groups[0])[:2])  # of one size
    objective.tokenizer.quantizer.eval()
    losses = objective(to_tensor(pictures.pictures).to(run.device), run.stage.weights, tokenized(run, pictures.texts),
                       run.training.model.scales[-1]).losses
    torch.stack([loss for name, loss in losses.items() if getattr(run.stage.weights, name)]).sum().backward()
    for parameter in objective.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    objective.zero_grad()
    objective.tokenizer.quantizer.train()


def tokenized(run: Run, texts: Sequence[str]) -> Tensor | None:
    """Ids [b, t] for the text tower, where the stage reads any."""
    contrast = run.objective.contrast
    return contrast.text.tokenize(texts).to(run.device) if contrast is not None and run.stage.weights.contrastive else None


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


def made_of(training: TrainTokenizer, tokenizer: VisualTokenizer) -> dict[str, str]:
    """What must be the same for a checkpoint to be continued: the recipe, and the embedding under the text tables if it is a language
    model's."""
    return {"recipe": recipe_hash(training), "text_checksum": tokenizer.text.checksum if tokenizer.text is not None else ""}


def refuse_others(checkpoint: Path, training: TrainTokenizer, tokenizer: VisualTokenizer) -> None:
    """Errors: ValueError where the checkpoint is of another recipe, or on another language model's rows."""
    then, now = {"text_checksum": "", **read_state(checkpoint)}, made_of(training, tokenizer)
    if then["recipe"] != now["recipe"]:
        raise ValueError(f"{checkpoint} is of recipe {then['recipe']}, this is recipe {now['recipe']}: choose another out, or remove "
                         f"{checkpoint.parent}")
    if then["text_checksum"] != now["text_checksum"]:
        raise ValueError(f"{training.text_rows} holds an embedding with checksum {now['text_checksum']}, {checkpoint} stands on one with "
                         f"{then['text_checksum'] or 'none'}: put that model's folder there")


def everything(run: Run, parts: Parts) -> dict[str, Any]:
    """What a checkpoint holds."""
    modules = {"objective": run.objective, "optimizer": parts.optimizer, "discriminator": parts.discriminator, "critic": parts.critic,
               "lecam": parts.lecam, "balance": parts.balance, "average": parts.average}
    return {**{name: part.state_dict() for name, part in modules.items() if part is not None}, "best": parts.best}


def restore(run: Run, parts: Parts, saved: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Go on from a checkpoint of this stage."""
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
