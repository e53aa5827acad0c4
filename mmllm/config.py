"""What a pretraining run is told: frozen dataclasses, and one check of everything that must fit together.

Each field is documented beneath itself; the command line shows those lines as help. Two kinds of rule: a value that is
wrong by itself, and values that are fine alone and wrong together (heads and tensor parallelism). `check` finds both at
once and lists every violation, each naming the thing, the value, the limit and the field to change, before any rank
starts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data.loader import DataConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder in the shape of Qwen3 (or Llama, without QK norm): RMSNorm, rotary positions, grouped queries, SwiGLU,
    no biases."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int | None = None
    """Key and value heads; as many as query heads if None."""
    ffn_hidden_size: int
    """Width of the gated MLP."""
    head_dim: int | None = None
    """Width of one head; hidden_size / num_attention_heads if None."""
    qk_layernorm: bool = True
    """RMSNorm on queries and keys: keeps mixed-modal attention logits from growing (Chameleon, arXiv:2405.09818,
    section 2.4.1)."""
    rotary_base: float = 10_000.0
    """Base period of the rotary position embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of new weights."""
    output_init_std: float | None = None
    """The same for the projections that write to the residual stream; init_std / sqrt(2 num_layers) if None, 0 starts
    each layer as the identity."""
    tie_embeddings: bool = False
    """Use the input embedding as the output layer's weight too."""

    @property
    def groups(self) -> int:
        return self.num_query_groups if self.num_query_groups is not None else self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the processes (ranks) share the work: ranks = tp × pp × dp."""

    ranks: int = 1
    """Processes in all; under torchrun, its world size."""
    tp: int = 1
    """Tensor parallel width: ranks that split every matrix (and, between matrices, the sequence)."""
    pp: int = 1
    """Pipeline stages: ranks that split the layers."""

    @property
    def dp(self) -> int:
        """Data parallel width: what is left."""
        return self.ranks // (self.tp * self.pp)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW: linear warmup, an optional hold, then cosine."""

    lr: float
    """Highest learning rate."""
    embedding_lr: float | None = None
    """Highest learning rate of the input embedding and the output layer; `lr` if None."""
    min_lr_ratio: float = 0.1
    """The cosine ends at this part of the highest rate."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    hold_ratio: float = 0.0
    """Part of all steps, counted from the end of the warmup, spent at the highest rate before the cosine begins."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the gradient's first and second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms) have none."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 for no limit."""
    z_loss: float = 1e-4
    """Weight of log²Z, which keeps the logits from drifting (PaLM, arXiv:2204.02311, section 5); 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train a decoder on packed rows with megatron-core."""

    out: Path
    """Run folder: recipe, metrics, checkpoints. A run that finds its own checkpoints there continues."""
    steps: int
    """Optimizer steps in all."""
    global_batch: int
    """Rows a step, over all ranks."""
    micro_batch: int = 1
    """Rows a rank puts through the model at once, as one longer row."""
    model: Model
    """The decoder."""
    optim: Optim
    """The optimizer and its schedule."""
    data: DataConfig
    """What to train on."""
    parallel: Parallel = field(default_factory=Parallel)
    """How ranks share the work."""
    seed: int = 0
    """Seed of the new weights."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What matrices are multiplied in; weights are kept in fp32 besides. auto: bf16 where the hardware multiplies it
    (CUDA, AVX512-BF16, AMX), else fp32, which is 5–8 × faster there."""
    text_loss_weight: float = 1.0
    """Weight of predicting a text token."""
    image_loss_weight: float = 1.0
    """Weight of predicting an image token."""
    init_rows: Path | None = None
    """A safetensors file with embedding rows to start from: `rows` [n, hidden] and `ids` [n], and `output_rows` [n,
    hidden] for the output layer where it should differ."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only (and when told to stop)."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl gets a record at each."""
    tensorboard: bool = False
    """Write TensorBoard events to the run folder too."""
    accept_changes: bool = False
    """Continue from a checkpoint although the recipe or the data order differs from what wrote it."""


CONTINUABLE = ("out", "steps", "save_every", "keep_last", "log_every", "tensorboard", "accept_changes", "parallel",
               "micro_batch", "init_rows")
"""Fields that a continued run may change: they alter neither the data order nor what a step computes (steps: only the
schedule)."""


def recipe_fields(recipe: Pretrain) -> dict[str, Any]:
    """The recipe as plain values, as written to the run folder and into checkpoints."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe), default=str))
    return plain


def recipe_hash(recipe: Pretrain) -> str:
    """Of what must be the same for a checkpoint to be continued."""
    fields = {k: v for k, v in recipe_fields(recipe).items() if k not in CONTINUABLE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def violations(recipe: Pretrain) -> list[str]:
    """Everything in the recipe that cannot work, a line each."""
    found: list[str] = []
    model, parallel, optim = recipe.model, recipe.parallel, recipe.optim

    def need(holds: bool, line: str) -> None:
        if not holds:
            found.append(line)

    for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"):
        need(getattr(model, name) >= 1, f"model.{name} is {getattr(model, name)}, must be at least 1")
    for name in ("ranks", "tp", "pp"):
        need(getattr(parallel, name) >= 1, f"parallel.{name} is {getattr(parallel, name)}, must be at least 1")
    for name in ("steps", "global_batch", "micro_batch", "keep_last", "log_every"):
        need(getattr(recipe, name) >= 1, f"{name} is {getattr(recipe, name)}, must be at least 1")
    if found:                                   # what follows divides by these
        return found

    heads, groups, tp, pp, ranks = model.num_attention_heads, model.groups, parallel.tp, parallel.pp, parallel.ranks
    need(model.head_dim is not None or model.hidden_size % heads == 0,
         f"model.hidden_size {model.hidden_size} is no multiple of model.num_attention_heads {heads}: change one, "
         "or give model.head_dim")
    need(model.head_width % 2 == 0,
         f"a head is {model.head_width} wide, rotary positions need an even width: change model.head_dim")
    need(groups >= 1 and heads % groups == 0,
         f"model.num_attention_heads {heads} is no multiple of model.num_query_groups {groups}: change one")
    need(groups % tp == 0,
         f"{groups} key heads cannot be split over {tp} ranks: change model.num_query_groups or parallel.tp")
    need(model.ffn_hidden_size % tp == 0,
         f"model.ffn_hidden_size {model.ffn_hidden_size} cannot be split over {tp} ranks: change it or parallel.tp")
    need(model.num_layers % pp == 0,
         f"model.num_layers {model.num_layers} cannot be split into {pp} stages: change it or parallel.pp")
    need(ranks % (tp * pp) == 0,
         f"{ranks} ranks are no multiple of tp × pp = {tp} × {pp}: change parallel.ranks, parallel.tp or parallel.pp")
    rows_at_once = max(1, parallel.dp) * recipe.micro_batch
    need(recipe.global_batch % rows_at_once == 0,
         f"global_batch {recipe.global_batch} is no multiple of dp × micro_batch = {max(1, parallel.dp)} × "
         f"{recipe.micro_batch}: change global_batch, micro_batch or parallel.ranks")
    row_len = getattr(recipe.data, "row_len", None)
    if isinstance(row_len, int):
        need(row_len * recipe.micro_batch % tp == 0,
             f"{recipe.micro_batch} rows of {row_len} tokens cannot be split over {tp} ranks: change data.row_len "
             "or parallel.tp")

    need(optim.lr > 0, f"optim.lr is {optim.lr}, must be above 0")
    need(optim.embedding_lr is None or optim.embedding_lr > 0,
         f"optim.embedding_lr is {optim.embedding_lr}, must be above 0")
    need(0 <= optim.min_lr_ratio <= 1, f"optim.min_lr_ratio is {optim.min_lr_ratio}, must be in [0, 1]")
    need(0 <= optim.hold_ratio <= 1, f"optim.hold_ratio is {optim.hold_ratio}, must be in [0, 1]")
    need(0 <= optim.warmup_steps <= recipe.steps,
         f"optim.warmup_steps is {optim.warmup_steps}, must be in [0, steps = {recipe.steps}]")
    need(all(0 <= beta < 1 for beta in optim.betas), f"optim.betas are {optim.betas}, each must be in [0, 1)")
    need(optim.clip_grad >= 0, f"optim.clip_grad is {optim.clip_grad}, must be at least 0")
    need(optim.z_loss >= 0, f"optim.z_loss is {optim.z_loss}, must be at least 0")
    weights = (recipe.text_loss_weight, recipe.image_loss_weight)
    need(min(weights) >= 0 < max(weights),
         f"text_loss_weight and image_loss_weight are {weights}: none below 0, one above")
    need(recipe.save_every >= 0, f"save_every is {recipe.save_every}, must be at least 0")
    need(recipe.init_rows is None or recipe.init_rows.is_file(), f"init_rows: there is no file {recipe.init_rows}")
    return found


def check(recipe: Pretrain) -> None:
    """Refuse a recipe that cannot work, with every reason at once."""
    found = violations(recipe)
    if found:
        raise ValueError("the recipe cannot work:\n" + "\n".join(f"  - {line}" for line in found))


def with_ranks(recipe: Pretrain, ranks: int) -> Pretrain:
    """The recipe on another number of processes."""
    return replace(recipe, parallel=replace(recipe.parallel, ranks=ranks))
