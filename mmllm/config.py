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
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from data import mixture
from data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder in the shape of Qwen3, of Llama (no QK norm), of Qwen2 (no QK norm, biases on queries, keys and values) or
    of Qwen3-MoE (experts): RMSNorm, rotary positions, grouped queries, SwiGLU."""

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
    qkv_bias: bool = False
    """Biases on queries, keys and values, as Qwen2 has."""
    rotary_base: float = 10_000.0
    """Base period of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How rotary frequencies are stretched to rows longer than the model began with: all alike (linear), the slow ones
    alone (llama3, as Llama 3.1), or by a ramp between two numbers of turns (yarn, arXiv:2309.00071)."""
    rope_factor: float = 1.0
    """How many times longer."""
    rope_original_len: int = 0
    """Tokens that the model began with; llama3 and yarn ask."""
    rope_low_freq_factor: float = 1.0
    """llama3: frequencies that turn less often than this within the original length are divided by the factor."""
    rope_high_freq_factor: float = 4.0
    """llama3: those that turn more often than this are left alone."""
    rope_beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this within the original length are left alone."""
    rope_beta_slow: float = 1.0
    """yarn: those that turn less often than this are divided by the factor."""
    rope_attention_factor: float | None = None
    """yarn: queries and keys are multiplied by this; 0.1 ln(rope_factor) + 1 if None."""
    image_positions: Literal["row", "grid"] = "row"
    """Positions of image codes. row: one after the other, as text. grid: each code at its place in the picture, the rotary
    frequencies shared among time, row and column (M-RoPE of Qwen2-VL, arXiv:2409.12191, section 2.1). No ordinary Hugging
    Face folder can say so: such a model is not exported."""
    num_experts: int = 0
    """Experts of each layer's MLP, of which each token goes to a few (mixture of experts); 0 for one MLP for all."""
    experts_per_token: int = 2
    """Experts that each token goes to, weighted by the softmax over them."""
    expert_ffn_hidden_size: int | None = None
    """Width of one expert; ffn_hidden_size if None."""
    balance_loss: float = 1e-3
    """Weight of the loss that keeps experts equally busy (Switch Transformer, arXiv:2101.03961, equation 4); 0 for none."""
    vocab_multiple: int = 128
    """The vocabulary rows of the model divide by this. The head's matrix products are fastest in multiples of 128 · tp."""
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

    @property
    def expert_width(self) -> int:
        return self.expert_ffn_hidden_size if self.expert_ffn_hidden_size is not None else self.ffn_hidden_size


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the processes (ranks) share the work: ranks = tp × pp × cp × dp."""

    ranks: int = 1
    """Processes in all; under torchrun, its world size."""
    tp: int = 1
    """Tensor parallel width: ranks that split every matrix."""
    sequence_parallel: bool = True
    """With tp: split the tokens between matrices too, which saves memory and costs nothing (arXiv:2205.05198, section 4.2)."""
    pp: int = 1
    """Pipeline stages: ranks that split the layers."""
    virtual_stages: int = 1
    """Chunks of layers of each pipeline stage: more make the pipeline's start and end shorter and its messages more
    (interleaved schedule, arXiv:2104.04473, section 2.2.2)."""
    first_stage_layers: int | None = None
    """Layers of the first stage, which holds the embedding too; as many as the others if None."""
    last_stage_layers: int | None = None
    """Layers of the last stage, which holds the output layer too; as many as the others if None."""
    cp: int = 1
    """Context parallel width: ranks that split the tokens of each document."""
    ep: int = 1
    """Expert parallel width: ranks, among those of dp, cp and tp, that share out the experts."""
    expert_tp: int = 1
    """Tensor parallel width inside an expert."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass instead of being kept: nothing, parts of each layer, or layers."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "layernorm"], ...] = ("core_attn",)
    """The parts, if selective. Fused attention keeps no scores: on CUDA core_attn saves little."""
    recompute_layers: int = 0
    """The first layers of each stage, if full; 0 for all of them."""

    @property
    def dp(self) -> int:
        """Data parallel width: what is left."""
        return self.ranks // (self.tp * self.pp * self.cp)

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers of each stage; [] where the rest cannot be shared out evenly."""
        given = ((0, self.first_stage_layers), (self.pp - 1, self.last_stage_layers))
        fixed = {stage: layers for stage, layers in given if layers is not None}
        left, stages = num_layers - sum(fixed.values()), self.pp - len(fixed)
        if (self.pp == 1 and fixed) or left < 0 or (left if stages == 0 else left % stages):
            return []
        return [fixed.get(stage, left // max(stages, 1)) for stage in range(self.pp)]


FP8_ALIGNMENT = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}
"""What every dimension of a matrix in FP8 must divide by, the tokens too: their number is the inner dimension of a weight's
gradient."""


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """Matrix products of the layers in 8 bits, with Transformer Engine on Hopper and newer. The embedding and the output
    layer stay in bf16."""

    scaling: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """How values are brought into 8 bits: by the largest of past steps (delayed), by the largest of this tensor
    (tensorwise), or by that of each block of 128 (blockwise)."""
    params: bool | None = None
    """Keep the weights in 8 bits beside the optimizer's fp32, so that less is gathered; if None, unless blockwise."""
    first_layers_bf16: int = 1
    """Layers at the start that stay in bf16; not with delayed scaling, which has one scale state for all layers."""
    last_layers_bf16: int = 1
    """The same at the end."""
    amax_history: int = 1024
    """Past steps that delayed scaling looks at."""

    @property
    def alignment(self) -> int:
        return FP8_ALIGNMENT[self.scaling]


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its learning rate: linear warmup, then what `schedule` says."""

    lr: float
    """Highest learning rate."""
    embedding_lr: float | None = None
    """Highest learning rate of the input embedding and the output layer; `lr` if None."""
    min_lr_ratio: float = 0.1
    """The rate ends at this part of the highest one."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    schedule: Literal["cosine", "wsd", "inverse_sqrt"] = "cosine"
    """cosine: falls over all of the run. wsd: stays highest, falls at the end; a run may be continued from where it stays (MiniCPM,
    arXiv:2404.06395, section 4). inverse_sqrt: with the square root of the step, to no end (arXiv:1706.03762, equation 3)."""
    hold_ratio: float = 0.0
    """cosine: part of all steps, counted from the end of the warmup, spent at the highest rate before it begins."""
    decay_ratio: float = 0.2
    """wsd: part of all steps, the last ones, in which the rate falls."""
    decay: Literal["1-sqrt", "linear"] = "1-sqrt"
    """wsd: how it falls (arXiv:2405.18392, section 3, found 1-sqrt the better)."""
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
class Spikes:
    """What becomes of a step whose loss or gradient norm is far above those before it. (One that is not finite ends the run.)"""

    rule: Literal["off", "skip", "stop"] = "off"
    """skip: the update is not made, the step counted and its samples named. stop: the run ends. Both save the batch for `mmllm replay`."""
    window: int = 128
    """Steps before it that were no spikes, of which mean and standard deviation are taken; the first `window` steps are all accepted."""
    deviations: float = 6.0
    """So many standard deviations above the mean are a spike."""
    in_a_row: int = 8
    """More spikes in a row than this end the run: it is not the data."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train a decoder on packed rows with megatron-core."""

    out: Path
    """Run folder: recipe, metrics, checkpoints. A run that finds its own checkpoints there continues."""
    steps: int
    """Optimizer steps in all."""
    global_batch: int
    """Rows a step, over all ranks."""
    batch_ramp: tuple[tuple[int, int], ...] = ()
    """Other batches later on: (step, rows), the rows of each step from that one on."""
    micro_batch: int = 1
    """Rows a rank puts through the model at once, as one longer row."""
    model: Model
    """The decoder."""
    optim: Optim
    """The optimizer and its schedule."""
    data: DataConfig
    """What to train on."""
    vocab_size: int | None = None
    """Ids of text, control tokens and image codes that the shards must have; None takes what they have. `mmllm plan` asks for it where
    there are no shards."""
    parallel: Parallel = field(default_factory=Parallel)
    """How ranks share the work."""
    seed: int = 0
    """Seed of the new weights."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What matrices are multiplied in; weights are kept in fp32 besides. auto: bf16 where the hardware multiplies it
    (CUDA, AVX512-BF16, AMX), else fp32, which is 5–8 × faster there."""
    fp8: Fp8 = field(default_factory=Fp8)
    """The layers' matrix products in 8 bits."""
    text_loss_weight: float = 1.0
    """Weight of predicting a text token."""
    image_loss_weight: float = 1.0
    """Weight of predicting an image token."""
    init_rows: Path | None = None
    """A safetensors file with embedding rows to start from: `rows` [n, hidden] and `ids` [n], and `output_rows` [n,
    hidden] for the output layer where it should differ."""
    init: Path | None = None
    """Weights to start from instead of new ones: what `mmllm import` wrote, or a checkpoint of another run. Not a resume: steps, data and
    optimizer begin anew."""
    loader_workers: int = 0
    """Processes of each rank that make rows ahead of time; 0 makes them between steps, which costs 25 µs a document."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only (and when told to stop)."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of it are never deleted; 0 makes no exception."""
    async_save: bool = True
    """Go on training while a checkpoint is written, from a copy in the host's memory."""
    failed_save: Literal["go_on", "stop"] = "go_on"
    """When a checkpoint cannot be written, on a full disk for example: go on, trying again when the next is due, or stop. The last one
    of a run must be written."""
    spikes: Spikes = field(default_factory=Spikes)
    """Steps far out of line."""
    hang_timeout_s: float = 480.0
    """A step that takes longer ends the run, with the stacks of every rank in hang_rank_*.txt; 0 waits for ever."""
    validate_every: int = 0
    """Steps between measurements of the loss on held-out rows; 0 for none."""
    validation: DataConfig | None = None
    """The held-out rows; those of `data` with `validation_prefix` if None."""
    validation_prefix: str = "seen"
    """Held-out shards: their names in the folder of `data` start so."""
    validation_rows: int = 64
    """Rows of each measurement, always the same."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl gets a record at each."""
    tensorboard: bool = False
    """Write TensorBoard events to the run folder too."""
    wandb: str = ""
    """A project of Weights & Biases to log to as well; WANDB_MODE=offline keeps the records in the run folder."""
    peak_tflops: float | None = None
    """What MFU is a part of, of one GPU; the published dense bf16 peak of the GPU if None, which a table has for common ones."""
    accept_changes: bool = False
    """Continue from a checkpoint although the recipe or the data order differs from what wrote it."""


CONTINUABLE = ("out", "steps", "save_every", "keep_last", "log_every", "tensorboard", "accept_changes", "parallel", "micro_batch", "init",
               "init_rows", "data", "loader_workers", "batch_ramp", "keep_every", "async_save", "failed_save", "spikes", "hang_timeout_s",
               "validate_every", "validation", "validation_prefix", "validation_rows", "wandb", "peak_tflops", "vocab_size")
"""Fields that a continued run may change: they alter neither the data order nor what a step computes (steps: only the
schedule; spikes: the steps to come). What may change in data says the plan, and in batch_ramp the rows: nothing that decides rows
already trained on."""


def batch_at(recipe: Pretrain, step: int) -> int:
    """Rows of a step, 0 …"""
    return next((rows for first, rows in reversed(recipe.batch_ramp) if step >= first), recipe.global_batch)


def rows_before(recipe: Pretrain, step: int) -> int:
    """Rows of all steps before one: the number of its first row."""
    borders = [0, *(min(first, step) for first, _ in recipe.batch_ramp), step]
    sizes = [recipe.global_batch, *(rows for _, rows in recipe.batch_ramp)]
    return sum((end - first) * rows for (first, end), rows in zip(pairwise(borders), sizes, strict=True))


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

    for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_multiple"):
        need(getattr(model, name) >= 1, f"model.{name} is {getattr(model, name)}, must be at least 1")
    for name in ("ranks", "tp", "pp", "virtual_stages", "cp", "ep", "expert_tp"):
        need(getattr(parallel, name) >= 1, f"parallel.{name} is {getattr(parallel, name)}, must be at least 1")
    for name in ("steps", "global_batch", "micro_batch", "keep_last", "log_every"):
        need(getattr(recipe, name) >= 1, f"{name} is {getattr(recipe, name)}, must be at least 1")
    if found:                                   # what follows divides by these
        return found

    found += _model_violations(model) + _layout_violations(recipe) + _fp8_violations(recipe)
    rows_at_once = max(1, parallel.dp) * recipe.micro_batch
    need(recipe.global_batch % rows_at_once == 0,
         f"global_batch {recipe.global_batch} is no multiple of dp × micro_batch = {max(1, parallel.dp)} × "
         f"{recipe.micro_batch}: change global_batch, micro_batch or parallel.ranks")
    found += mixture.violations(recipe.data.stages)
    found += _weeks_violations(recipe, rows_at_once)

    need(optim.lr > 0, f"optim.lr is {optim.lr}, must be above 0")
    need(optim.embedding_lr is None or optim.embedding_lr > 0,
         f"optim.embedding_lr is {optim.embedding_lr}, must be above 0")
    need(0 <= optim.min_lr_ratio <= 1, f"optim.min_lr_ratio is {optim.min_lr_ratio}, must be in [0, 1]")
    for name in ("hold_ratio", "decay_ratio"):
        need(0 <= getattr(optim, name) <= 1, f"optim.{name} is {getattr(optim, name)}, must be in [0, 1]")
    need(optim.schedule != "inverse_sqrt" or optim.warmup_steps > 0,
         "optim.schedule inverse_sqrt counts from the end of the warmup: optim.warmup_steps is 0, must be at least 1")
    need(0 <= optim.warmup_steps <= recipe.steps,
         f"optim.warmup_steps is {optim.warmup_steps}, must be in [0, steps = {recipe.steps}]")
    need(all(0 <= beta < 1 for beta in optim.betas), f"optim.betas are {optim.betas}, each must be in [0, 1)")
    need(optim.clip_grad >= 0, f"optim.clip_grad is {optim.clip_grad}, must be at least 0")
    need(optim.z_loss >= 0, f"optim.z_loss is {optim.z_loss}, must be at least 0")
    weights = (recipe.text_loss_weight, recipe.image_loss_weight)
    need(min(weights) >= 0 < max(weights),
         f"text_loss_weight and image_loss_weight are {weights}: none below 0, one above")
    for name in ("save_every", "loader_workers"):
        need(getattr(recipe, name) >= 0, f"{name} is {getattr(recipe, name)}, must be at least 0")
    found += _unlike_init(recipe)
    need(recipe.init_rows is None or recipe.init_rows.is_file(), f"init_rows: there is no file {recipe.init_rows}")
    return found


def _model_violations(model: Model) -> list[str]:
    """Of the decoder's shape alone."""
    heads, groups, scaling = model.num_attention_heads, model.groups, model.rope_scaling
    rules = [
        (model.head_dim is not None or model.hidden_size % heads == 0,
         f"model.hidden_size {model.hidden_size} is no multiple of model.num_attention_heads {heads}: change one, or give model.head_dim"),
        (model.head_width % 2 == 0, f"a head is {model.head_width} wide, rotary positions need an even width: change model.head_dim"),
        (model.image_positions == "row" or model.head_width % 16 == 0,
         f"a head is {model.head_width} wide, model.image_positions grid needs a multiple of 16: change model.head_dim"),
        (groups >= 1 and heads % groups == 0,
         f"model.num_attention_heads {heads} is no multiple of model.num_query_groups {groups}: change one"),
        (scaling == "none" or model.rope_factor >= 1, f"model.rope_factor is {model.rope_factor}, must be at least 1"),
        (scaling not in ("llama3", "yarn") or model.rope_original_len >= 1,
         f"model.rope_scaling {scaling} asks for model.rope_original_len, which is {model.rope_original_len}"),
        (scaling != "llama3" or 0 < model.rope_low_freq_factor < model.rope_high_freq_factor,
         f"model.rope_low_freq_factor is {model.rope_low_freq_factor}, must be above 0 and below model.rope_high_freq_factor "
         f"{model.rope_high_freq_factor}"),
        (scaling != "yarn" or 0 < model.rope_beta_slow < model.rope_beta_fast,
         f"model.rope_beta_slow is {model.rope_beta_slow}, must be above 0 and below model.rope_beta_fast {model.rope_beta_fast}"),
        (model.num_experts >= 0, f"model.num_experts is {model.num_experts}, must be at least 0"),
        (not model.num_experts or 1 <= model.experts_per_token <= model.num_experts,
         f"model.experts_per_token is {model.experts_per_token}, must be in [1, model.num_experts = {model.num_experts}]"),
        (model.balance_loss >= 0, f"model.balance_loss is {model.balance_loss}, must be at least 0"),
    ]
    return [line for holds, line in rules if not holds]


def _layout_violations(recipe: Pretrain) -> list[str]:
    """Of what each way of sharing the work can split."""
    model, parallel, ranks = recipe.model, recipe.parallel, recipe.parallel.ranks
    tp, pp, cp, ep, chunks = parallel.tp, parallel.pp, parallel.cp, parallel.ep, parallel.virtual_stages
    split_tokens = tp > 1 and parallel.sequence_parallel
    stages, tokens = parallel.stage_layers(model.num_layers), recipe.data.row_len * recipe.micro_batch
    expert_ranks, expert_width = parallel.expert_tp * ep * pp, model.expert_width
    uneven = parallel.first_stage_layers is not None or parallel.last_stage_layers is not None
    each = "" if not uneven else (f" with parallel.first_stage_layers {parallel.first_stage_layers} and parallel.last_stage_layers "
                                  f"{parallel.last_stage_layers}")
    micro = max(1, parallel.dp) * recipe.micro_batch * pp
    batches = [recipe.global_batch, *(rows for _, rows in recipe.batch_ramp)]
    rules = [
        (model.groups % tp == 0, f"{model.groups} key heads cannot be split over {tp} ranks: change model.num_query_groups or parallel.tp"),
        (bool(model.num_experts) or model.ffn_hidden_size % tp == 0,
         f"model.ffn_hidden_size {model.ffn_hidden_size} cannot be split over {tp} ranks: change it or parallel.tp"),
        (model.vocab_multiple % tp == 0, f"model.vocab_multiple {model.vocab_multiple} is no multiple of parallel.tp {tp}: change one"),
        (bool(stages), f"model.num_layers {model.num_layers} cannot be split into {pp} stages{each}: change it or parallel.pp"),
        (min(stages, default=1) >= 1, f"a pipeline stage has no layer, stages are {stages}: change parallel.pp or its stages' layers"),
        (ranks % (tp * pp * cp) == 0, f"{ranks} ranks are no multiple of tp × pp × cp = {tp} × {pp} × {cp}: change parallel.ranks, "
         "parallel.tp, parallel.pp or parallel.cp"),
        (not split_tokens or cp > 1 or tokens % tp == 0,
         f"{recipe.micro_batch} rows of {recipe.data.row_len} tokens cannot be split over {tp} ranks: change data.row_len or parallel.tp"),
        (chunks == 1 or pp > 1, f"parallel.virtual_stages {chunks} needs parallel.pp above 1"),
        (chunks == 1 or all(layers % chunks == 0 for layers in stages),
         f"stages of {stages} layers cannot be cut into {chunks} chunks each: change parallel.virtual_stages or model.num_layers"),
        (chunks == 1 or all(rows % micro == 0 for rows in batches),
         f"with parallel.virtual_stages the micro-batches of a rank must divide by parallel.pp: rows a step {batches} by "
         f"dp × micro_batch × pp = {micro}: change global_batch, batch_ramp or micro_batch"),
        (ep == 1 or bool(model.num_experts), f"parallel.ep is {ep}, but model.num_experts is 0: nothing to share out"),
        (parallel.expert_tp == 1 or bool(model.num_experts), f"parallel.expert_tp is {parallel.expert_tp}, but model.num_experts is 0"),
        (not model.num_experts or model.num_experts % ep == 0,
         f"model.num_experts {model.num_experts} cannot be shared out over {ep} ranks: change it or parallel.ep"),
        (not model.num_experts or expert_width % parallel.expert_tp == 0,
         f"an expert of width {expert_width} cannot be split over {parallel.expert_tp} ranks: change model.expert_ffn_hidden_size or "
         "parallel.expert_tp"),
        (not model.num_experts or ranks % expert_ranks == 0,
         f"{ranks} ranks are no multiple of expert_tp × ep × pp = {parallel.expert_tp} × {ep} × {pp}: change parallel.ranks, "
         "parallel.expert_tp, parallel.ep or parallel.pp"),
        (not model.num_experts or tp == 1 or parallel.sequence_parallel,
         f"experts with parallel.tp {tp} need parallel.sequence_parallel"),
        (parallel.recompute != "selective" or bool(parallel.recompute_modules),
         "parallel.recompute is selective, but parallel.recompute_modules names nothing"),
        (not ("moe" in parallel.recompute_modules and parallel.recompute == "selective") or bool(model.num_experts),
         "parallel.recompute_modules names moe, but model.num_experts is 0"),
        (0 <= parallel.recompute_layers <= model.num_layers,
         f"parallel.recompute_layers is {parallel.recompute_layers}, must be in [0, model.num_layers = {model.num_layers}]"),
    ]
    return [line for holds, line in rules if not holds]


def _fp8_violations(recipe: Pretrain) -> list[str]:
    """Of what Transformer Engine asks of matrices in 8 bits."""
    fp8, model, parallel = recipe.fp8, recipe.model, recipe.parallel
    if fp8.scaling == "none":
        return []
    tp, a, width = parallel.tp, fp8.alignment, model.head_width
    split = tp if parallel.sequence_parallel else 1
    tokens = recipe.data.row_len * recipe.micro_batch
    mlp = ("model.expert_ffn_hidden_size", model.expert_width // parallel.expert_tp) if model.num_experts else (
        "model.ffn_hidden_size", model.ffn_hidden_size // tp)
    widths = {"model.hidden_size": model.hidden_size, f"{mlp[0]} of a rank": mlp[1],
              "query heads of a rank × head width": model.num_attention_heads // tp * width,
              "query, key and value heads of a rank × head width": (model.num_attention_heads + 2 * model.groups) // tp * width}
    ends = fp8.first_layers_bf16, fp8.last_layers_bf16
    most = model.num_layers // parallel.pp
    rules = [
        (recipe.precision == "bf16", f"fp8 needs precision bf16, it is {recipe.precision}"),
        # with cp, rows are lengthened to what divides (batch.lengthened)
        (parallel.cp > 1 or tokens % (a * split) == 0,
         f"fp8.scaling {fp8.scaling} needs tokens of a micro-batch in multiples of {a} × {split} (alignment × tp): micro_batch × "
         f"data.row_len is {recipe.micro_batch} × {recipe.data.row_len}: change data.row_len"),
        *((number % a == 0, f"fp8.scaling {fp8.scaling} needs multiples of {a}: {name} is {number}") for name, number in widths.items()),
        (fp8.scaling != "delayed" or ends == (0, 0),
         f"delayed scaling keeps no layer in bf16: fp8.first_layers_bf16 and fp8.last_layers_bf16 are {ends}, set both to 0"),
        (min(ends) >= 0 and max(ends) <= most,
         f"fp8.first_layers_bf16 and fp8.last_layers_bf16 are {ends}, must be in [0, layers of a stage = {most}]"),
        (fp8.scaling != "delayed" or parallel.recompute != "selective" or "layernorm" not in parallel.recompute_modules,
         "delayed scaling does not allow layernorm in parallel.recompute_modules"),
        (not (fp8.scaling == "blockwise" and fp8.params), "blockwise scaling keeps its weights in bf16: fp8.params cannot be set"),
        (fp8.amax_history >= 1, f"fp8.amax_history is {fp8.amax_history}, must be at least 1"),
    ]
    return [line for holds, line in rules if not holds]


def _weeks_violations(recipe: Pretrain, rows_at_once: int) -> list[str]:
    """Of the fields that matter for a run of weeks."""
    found, spikes = list[str](), recipe.spikes
    starts = [first for first, _ in recipe.batch_ramp]
    if starts != sorted({*starts} - {0}) or any(first < 0 for first in starts):
        found.append(f"batch_ramp changes at steps {starts}: they must rise and lie above 0")
    found += [f"batch_ramp has {rows} rows from step {first}, which is no positive multiple of dp × micro_batch = {rows_at_once}: change "
              "batch_ramp, micro_batch or parallel.ranks" for first, rows in recipe.batch_ramp if rows < 1 or rows % rows_at_once]
    for name in ("keep_every", "validate_every", "hang_timeout_s"):
        if getattr(recipe, name) < 0:
            found.append(f"{name} is {getattr(recipe, name)}, must be at least 0")
    if recipe.validate_every and (recipe.validation_rows < 1 or recipe.validation_rows % rows_at_once):
        found.append(f"validation_rows {recipe.validation_rows} is no positive multiple of dp × micro_batch = {rows_at_once}: change "
                     "validation_rows, micro_batch or parallel.ranks")
    if recipe.validation is not None:
        if recipe.validation.row_len != recipe.data.row_len:
            found.append(f"validation.row_len is {recipe.validation.row_len}, data.row_len {recipe.data.row_len}: make them equal")
        found += [f"validation: {line}" for line in mixture.violations(recipe.validation.stages)]
    if spikes.window < 2 or spikes.deviations <= 0 or spikes.in_a_row < 0:
        found.append(f"spikes.window {spikes.window} must be at least 2, spikes.deviations {spikes.deviations} above 0, spikes.in_a_row "
                     f"{spikes.in_a_row} at least 0")
    if recipe.peak_tflops is not None and recipe.peak_tflops <= 0:
        found.append(f"peak_tflops is {recipe.peak_tflops}, must be above 0")
    return found


WEIGHTLESS = ("init_std", "output_init_std", "balance_loss", "vocab_multiple")
"""Fields of a model that its weights do not depend on."""


def _unlike_init(recipe: Pretrain) -> list[str]:
    """What keeps the model from having the weights of `recipe.init`."""
    if recipe.init is None:
        return []
    path = recipe.init / "state.json"
    if not path.is_file():
        return [f"init: {recipe.init} has no state.json: give what `mmllm import` wrote, or a checkpoint"]
    fields = json.loads(path.read_text())["recipe"]["model"]
    saved = Model(**{name: value for name, value in fields.items() if name in Model.__annotations__})
    theirs, ours = (replace(model, num_query_groups=model.groups, head_dim=model.head_width) for model in (saved, recipe.model))
    lines = [f"model.{name} is {value}, that of init {getattr(theirs, name)}: set it so" for name, value in asdict(ours).items()
             if name not in WEIGHTLESS and value != getattr(theirs, name)]
    if recipe.init_rows is not None:
        lines.append("init_rows and init are both set: give the rows to `mmllm import`, or none")
    return lines


def check(recipe: Pretrain) -> None:
    """Refuse a recipe that cannot work, with every reason at once."""
    found = violations(recipe)
    if found:
        raise ValueError("the recipe cannot work:\n" + "\n".join(f"  - {line}" for line in found))


def with_ranks(recipe: Pretrain, ranks: int) -> Pretrain:
    """The recipe on another number of processes."""
    return replace(recipe, parallel=replace(recipe.parallel, ranks=ranks))
