"""What an instruction tuning run is asked to do, and what cannot be asked."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data import mixture
from data.config import DataConfig

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The matrices of a layer, as Hugging Face names them."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank differences of matrices in their place: W + (alpha / rank) B A, Hu et al. 2021, arXiv:2106.09685, section 4.1."""

    rank: int = 0
    """Rows of A; 0 trains all weights instead."""
    alpha: float = 32.0
    """The difference is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of a matrix's inputs that its difference does not see in training."""
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Matrices that get one."""
    rows: Literal["none", "ours", "all"] = "ours"
    """Rows of embedding and output layer that are trained besides: none, those of control tokens and image codes, or all. A base model
    that never saw a picture needs `ours`."""


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Instruction tuning of a model folder."""

    out: Path
    """Run folder: recipe, metrics, checkpoints, and the tuned model in `hf`. Found checkpoints are continued."""
    init: Path
    """Model folder to start from, as `mmllm export` writes it."""
    data: DataConfig
    """Token shards, and how they become rows; several sources are mixed by `data.stages`."""
    conversations: Literal["auto", "as they are", "from pairs"] = "auto"
    """Conversations are in the shards, as documents with roles, or are made from pictures with texts and questions. auto: as they are
    where the first shard of a source has any. Documents of a mixture without roles are trained as in pretraining."""
    steps: int
    """Optimizer steps in all."""
    global_batch: int
    """Rows a step, over all ranks."""
    micro_batch: int = 0
    """Rows of a rank that go forward and back at once; 0 for all of them."""
    lr: float
    """Highest learning rate; cosine from there."""
    min_lr_ratio: float = 0.1
    """The cosine ends at this part of it."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the gradient's first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient."""
    lora: Lora = Lora()
    """What is trained; all weights by default. The adapter of a run with a rank is saved in `adapter` too, as peft reads it."""
    ranks: int = 2
    """Data-parallel processes; under torchrun, its world size."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO splits over ranks: 1 optimizer states, 2 gradients too, 3 weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the host's memory instead of the device's: nothing, optimizer states with the masters (ZeRO 1 and up), or the split
    weights too (ZeRO 3)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the working weights; fp32 masters of what is trained are kept. auto: bf16 where the hardware multiplies it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    seed: int = 0
    """For whatever is random; the order of rows is data.seed's."""
    loader_workers: int = 0
    """Processes of each rank that make rows ahead of time; 0 makes them between steps."""
    save_every: int = 0
    """Steps between checkpoints; 0 keeps none unless told to stop."""
    keep_last: int = 1
    """Checkpoints kept; older ones are deleted."""
    validate_every: int = 0
    """Steps between measurements of the loss on held-out rows; 0 for none."""
    validation: DataConfig | None = None
    """The held-out rows; those of `data` with `validation_prefix` if None."""
    validation_prefix: str = "val"
    """Held-out shards: their names in the folders of `data` start so."""
    validation_rows: int = 64
    """Rows of each measurement, always the same."""
    export_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the weights in `hf`: the masters as they are, or rounded."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl gets a record at each."""
    tensorboard: bool = False
    """Write TensorBoard events to the run folder too."""

    @property
    def micro(self) -> int:
        """Rows that go forward at once."""
        return self.micro_batch or self.global_batch // self.ranks

    @property
    def held_out(self) -> DataConfig:
        """Where the rows of validation come from: of a mixture, the last stage."""
        return self.validation or self.data.held_out(self.validation_prefix)


CONTINUABLE = ("out", "init", "data", "loader_workers", "save_every", "keep_last", "validate_every", "validation", "validation_prefix",
               "validation_rows", "export_precision", "log_every", "tensorboard")
"""Fields that a continued run may change: no step depends on them. `init` and `data` are compared by what is in them."""


def fields_of(recipe: Sft) -> dict[str, Any]:
    """The recipe as plain values, as written to the run folder and into checkpoints."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe), default=str))
    return plain


def kept(recipe: Sft) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    return {name: value for name, value in fields_of(recipe).items() if name not in CONTINUABLE}


def recipe_hash(recipe: Sft) -> str:
    return hashlib.sha256(json.dumps(kept(recipe), sort_keys=True).encode()).hexdigest()[:16]


def violations(recipe: Sft) -> list[str]:
    """Everything in the recipe that cannot work, a line each."""
    found: list[str] = []
    for name in ("steps", "global_batch", "ranks", "keep_last", "log_every"):
        if getattr(recipe, name) < 1:
            found.append(f"{name} is {getattr(recipe, name)}, must be at least 1")
    for name in ("save_every", "loader_workers", "validate_every"):
        if getattr(recipe, name) < 0:
            found.append(f"{name} is {getattr(recipe, name)}, must be at least 0")
    if recipe.ranks >= 1:
        share = recipe.global_batch // recipe.ranks
        if recipe.global_batch % recipe.ranks:
            found.append(f"global_batch {recipe.global_batch} does not divide by ranks {recipe.ranks}: change one")
        elif recipe.micro_batch < 0 or (recipe.micro_batch and share % recipe.micro_batch):
            found.append(f"micro_batch {recipe.micro_batch} does not divide the {share} rows of a rank: give 0")
        if recipe.validate_every and (recipe.validation_rows < 1 or recipe.validation_rows % recipe.ranks):
            found.append(f"validation_rows {recipe.validation_rows} is no positive multiple of ranks {recipe.ranks}: change one")
    if recipe.lr <= 0:
        found.append(f"lr is {recipe.lr}, must be above 0")
    if not 0 <= recipe.warmup_steps <= recipe.steps:
        found.append(f"warmup_steps is {recipe.warmup_steps}, must be in [0, steps = {recipe.steps}]")
    if not 0 <= recipe.min_lr_ratio <= 1:
        found.append(f"min_lr_ratio is {recipe.min_lr_ratio}, must be in [0, 1]")
    lowest = {"none": 0, "optimizer": 1, "all": 3}[recipe.offload]
    if recipe.zero_stage < lowest:
        found.append(f"offload {recipe.offload!r} needs zero_stage {lowest} or higher, it is {recipe.zero_stage}")
    found += _of_lora(recipe.lora)
    found += mixture.violations(recipe.data.stages)
    if recipe.validation is not None:
        found += [f"validation: {line}" for line in mixture.violations(recipe.validation.stages)]
    return found


def _of_lora(lora: Lora) -> list[str]:
    found: list[str] = []
    if lora.rank < 0:
        found.append(f"lora.rank is {lora.rank}, must be at least 0")
    if lora.alpha <= 0:
        found.append(f"lora.alpha is {lora.alpha}, must be above 0")
    if not 0 <= lora.dropout < 1:
        found.append(f"lora.dropout is {lora.dropout}, must be in [0, 1)")
    if lora.rank and not lora.targets:
        found.append("lora.targets is empty: name matrices, or give lora.rank 0 to train all weights")
    return found


def learning_rate(recipe: Sft, step: int) -> float:
    """Linear warmup, then cosine to min_lr_ratio of the highest. step: 0 …"""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
