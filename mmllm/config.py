"""What a pretraining run is told: frozen dataclasses.

Each field is documented beneath itself; the command line shows those lines as help. What must fit together is checked by
`mmllm.violations`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

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

    def vocab_rows(self, ids: int) -> int:
        """Ids that mean something → vocabulary rows."""
        return -(-ids // self.vocab_multiple) * self.vocab_multiple


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

    @property
    def keeps_params(self) -> bool:
        """Weights in 8 bits. Blocks of 128 cannot be gathered from the slices of the distributed optimizer."""
        return self.scaling not in ("none", "blockwise") and self.params is not False


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
    (CUDA, AVX512-BF16, AMX), else fp32."""
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


def with_ranks(recipe: Pretrain, ranks: int) -> Pretrain:
    """The recipe on another number of processes."""
    return replace(recipe, parallel=replace(recipe.parallel, ranks=ranks))
