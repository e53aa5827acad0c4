"""DeepSpeed around the model of a folder: what is trained, how ZeRO splits it, and the whole weights again at the end."""

import contextlib
import importlib
import os
from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmllm import hf
from mmllm.run import resolve_precision
from mmllm.runs.sft_lora import adapt
from mmllm.runs.sft_loss import AssistantLoss
from mmllm.runs.sft_recipe import Sft


def load_deepspeed() -> Any:
    """Import DeepSpeed, quiet, and without the shared-memory kernel that it compiles on CPUs for minutes."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for a GPU must not claim it before the fork
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # DeepSpeed's Muon, unused, would import a compiler: 2 s
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import logging

    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger
    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("transformers.models.qwen3.modeling_qwen3", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(name)  # 5 s that would else be spent in every rank, after the fork
    return deepspeed


def settings(recipe: Sft) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe."""
    cuda, accumulated = torch.cuda.is_available(), recipe.global_batch // recipe.ranks // recipe.micro
    bf16 = resolve_precision(recipe.precision) is torch.bfloat16
    zero: dict[str, Any] = {"stage": recipe.zero_stage, "overlap_comm": cuda}
    host = {"device": "cpu", "pin_memory": cuda}
    if recipe.offload != "none":
        zero["offload_optimizer"] = host
    if recipe.offload == "all":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": recipe.micro, "train_batch_size": recipe.global_batch,
        "gradient_accumulation_steps": accumulated, "gradient_clipping": recipe.clip_grad, "bf16": {"enabled": bf16},
        # a sum of many bf16 gradients would lose the small ones
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and recipe.zero_stage and accumulated > 1 else {}),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled first
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62, "wall_clock_breakdown": False,
    }


def build(deepspeed: Any, recipe: Sft, folder: hf.Folder) -> Any:
    """The model of the folder under ZeRO."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging
    transformers_logging.disable_progress_bar()
    cuda, config = torch.cuda.is_available(), settings(recipe)
    keep: Any = None
    if recipe.zero_stage == 3:  # weights are split while they are read
        from transformers.integrations import HfDeepSpeedConfig
        keep = HfDeepSpeedConfig(config)
    attention = "sdpa" if cuda else "eager"  # the fused kernel is several times slower for short documents on a CPU
    causal = AutoModelForCausalLM.from_pretrained(folder.path, dtype=resolve_precision(recipe.precision), attn_implementation=attention)
    if recipe.lora.rank:
        adapt(causal, recipe, folder.vocab.text_size, deepspeed.zero.GatheredParameters)
    if recipe.gradient_checkpointing:
        causal.gradient_checkpointing_enable({"use_reentrant": False})  # the other kind wants inputs with a gradient
    model = AssistantLoss(causal).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, others = ([p for p in trained if (len(shape(p)) > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # in the host's memory one fused pass over all states is several times faster
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True if recipe.offload != "none" else None)
    with quiet():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    del keep
    return engine


def full_weights(deepspeed: Any, engine: Any) -> dict[str, Tensor]:
    """All weights under the model's names, fp32, from the masters of those that are trained; every rank takes part, the first gets them."""
    from deepspeed.utils import safe_get_full_fp32_param
    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with contextlib.nullcontext() if parameter.requires_grad else deepspeed.zero.GatheredParameters([parameter]):
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            value = parameter.detach() if master is None else master
            if dist.get_rank() == 0:
                tensors[name.removeprefix("causal.")] = value.float().cpu().reshape(shape(parameter)).clone()
    return tensors


def shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, where ZeRO 3 left a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def count(parameter: Any) -> int:
    """Its numbers, where ZeRO 3 left a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """DeepSpeed prints to the screen as well as to its logger."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield
