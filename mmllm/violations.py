"""Everything in a pretraining recipe that cannot work, found before any rank starts.

Two kinds of rule: a value that is wrong by itself, and values that are fine alone and wrong together (heads and tensor parallelism).
Every violation is listed at once, each naming the thing, the value, the limit and the field to change.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from data import mixture
from mmllm.config import Model, Pretrain


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
        # with cp, rows are lengthened to what divides (batch.shared_len)
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
