"""Tune a Hugging Face folder on conversations with DeepSpeed ZeRO: the loop, top to bottom.

`main` checks the recipe and starts the ranks (under torchrun it is one); `train` is what each rank does; the result is
another Hugging Face folder, `out/hf`, or, when the run was told to stop, a checkpoint that the same command continues.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data.chat import ChatLoader
from data.encode import fingerprint
from data.loader import DataConfig, Row
from data.vocab import Vocab
from mmllm import hf, launch
from mmllm.run import Log, resident_bytes, seed_all, write_json
from mmllm.runs.sft_loss import AssistantLoss, document_groups, on

STOPPED = 143
"""Exit code after SIGTERM, the checkpoint saved: 128 + 15, as shells say it."""


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Instruction tuning of a model folder."""

    out: Path
    """Run folder: recipe, metrics, checkpoint, and the tuned model in `hf`. Found checkpoints are continued."""
    init: Path
    """Model folder to start from, as `mmllm export` writes it."""
    data: DataConfig
    """Token shards of pictures with texts and questions, and how they become conversations."""
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
    ranks: int = 2
    """Data-parallel processes; under torchrun, its world size."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO splits over ranks: 1 optimizer states, 2 gradients too, 3 weights too."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the working weights; fp32 masters are kept. auto: bf16 where the hardware multiplies it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    seed: int = 0
    """For whatever is random; the order of rows is data.seed's."""
    save_every: int = 0
    """Steps between checkpoints; 0 keeps none unless told to stop."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl gets a record at each."""


class Rows(Protocol):
    """Packed rows by number; `data.chat.ChatLoader` or `data.loader.Loader`."""

    vocab: Vocab
    row_len: int
    plan_hash: str

    def row(self, number: int) -> Row: ...


def check(recipe: Sft) -> None:
    """Refuse a recipe that cannot work, with every reason at once."""
    found: list[str] = []
    for name in ("steps", "global_batch", "ranks", "log_every"):
        if getattr(recipe, name) < 1:
            found.append(f"{name} is {getattr(recipe, name)}, must be at least 1")
    if recipe.ranks >= 1:
        share = recipe.global_batch // recipe.ranks
        if recipe.global_batch % recipe.ranks:
            found.append(f"global_batch {recipe.global_batch} does not divide by ranks {recipe.ranks}: change one")
        elif recipe.micro_batch < 0 or (recipe.micro_batch and share % recipe.micro_batch):
            found.append(f"micro_batch {recipe.micro_batch} does not divide the {share} rows of a rank: give 0")
    if recipe.lr <= 0:
        found.append(f"lr is {recipe.lr}, must be above 0")
    if not 0 <= recipe.warmup_steps <= recipe.steps:
        found.append(f"warmup_steps is {recipe.warmup_steps}, must be in [0, steps = {recipe.steps}]")
    if not 0 <= recipe.min_lr_ratio <= 1:
        found.append(f"min_lr_ratio is {recipe.min_lr_ratio}, must be in [0, 1]")
    if found:
        raise ValueError("the recipe cannot work:\n" + "\n".join(f"  - {line}" for line in found))
    hf.check_target(recipe.out / "hf")


def main(recipe: Sft) -> Path:
    """Tune to `recipe.steps`. → the tuned model folder."""
    check(recipe)
    conversations(recipe, hf.open_folder(recipe.init))  # what is wrong with them is said before ranks start
    if launch.under_torchrun():
        if int(os.environ["WORLD_SIZE"]) != recipe.ranks:
            raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} ranks, the recipe has ranks {recipe.ranks}")
        train(recipe)
    else:
        launch.launch("mmllm.runs.sft_ranks:train", recipe, recipe.ranks)
    if (recipe.out / "checkpoints" / "newest.json").is_file():
        raise SystemExit(STOPPED)  # told to stop, saved, to be continued
    return recipe.out / "hf"


def train(recipe: Sft) -> None:
    """One rank: model folder and conversations, then `fit`."""
    folder = hf.open_folder(recipe.init)
    fit(recipe, folder, conversations(recipe, folder))


def conversations(recipe: Sft, folder: hf.Folder) -> ChatLoader:
    """Rows from the recipe's token shards. Errors: ValueError for shards that other tokenizers made."""
    made_by = fingerprint(hf.fingerprint(folder.visual_tokenizer), folder.text.fingerprint, folder.vocab)
    return ChatLoader(recipe.data, folder.text.encode, made_by)


def fit(recipe: Sft, folder: hf.Folder, rows: Rows) -> None:
    """One rank, given its rows: join, step after step, write the folder."""
    deepspeed = load_deepspeed()
    launch.join()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    seed_all(recipe.seed)
    rank = dist.get_rank()
    engine = _engine(deepspeed, recipe, folder)
    checkpoints = recipe.out / "checkpoints"
    first = _resume(engine, checkpoints, recipe, rows)
    stop = {"asked": False}
    signal.signal(signal.SIGTERM, lambda *_: stop.update(asked=True))
    first_image = rows.vocab.first_image
    micro = recipe.micro_batch or recipe.global_batch // recipe.ranks
    log = None
    if rank == 0:
        names = {"hash": recipe_hash(recipe), "plan_hash": rows.plan_hash}
        write_json(recipe.out / "recipe.json", {**names, **asdict(recipe)})
        log = Log(recipe.out, recipe.steps, after_step=first, title="tune")
        parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters())
        log.say(f"{recipe.out}: {parameters:,} parameters, ZeRO {recipe.zero_stage} on {recipe.ranks} ranks, "
                f"{str(_dtype(recipe.precision))[6:]}, steps {first}–{recipe.steps}")
    clock, tokens, step = time.perf_counter(), 0, first
    while step < recipe.steps:
        start = step * recipe.global_batch + rank * (recipe.global_batch // recipe.ranks)
        own = [rows.row(start + i) for i in range(recipe.global_batch // recipe.ranks)]
        # the sum over all ranks decides the scale of each one's loss: a mean over tokens, whoever holds them
        total, stopping = _sum([float(sum(row.loss_weight.sum() for row in own)), float(stop["asked"])], engine.device)
        if total == 0:
            raise ValueError(f"step {step}: none of the {recipe.global_batch} rows has a token of the assistant")
        lr = learning_rate(recipe, step)
        for parameters in engine.optimizer.param_groups:
            parameters["lr"] = lr
        statistics = torch.zeros(4, device=engine.device)
        for at in range(0, len(own), micro):
            groups = [on(engine.device, group) for group in document_groups(own[at:at + micro])]
            loss, sums = engine(groups, first_image)
            statistics += sums
            # ZeRO averages over ranks; the loss is already divided by the weight of all of them
            engine.backward(loss * (recipe.ranks / total), scale_wrt_gas=False)
            engine.step()
        values = _means(_sum(statistics.tolist(), engine.device))
        if not math.isfinite(values["loss"]):
            keys = ", ".join([key for row in own for key in row.keys][:20])
            raise FloatingPointError(f"step {step}, rank {rank}: loss is {values['loss']}; samples begin with {keys}")
        step += 1
        tokens += recipe.global_batch * rows.row_len
        if log and (step % recipe.log_every == 0 or step in (first + 1, recipe.steps)):
            now = time.perf_counter()
            log.record({"step": step, **values, "lr": lr, "grad_norm": float(engine.get_global_grad_norm() or 0.0),
                        "tokens_per_s": tokens / (now - clock), "memory_bytes": resident_bytes()})
            clock, tokens = now, 0
        if step < recipe.steps and (stopping or (recipe.save_every and step % recipe.save_every == 0)):
            _save(engine, checkpoints, step, recipe, rows)
            if stopping:
                if log:
                    log.say(f"told to stop: saved step {step}, the same command continues")
                break
    if step == recipe.steps:
        tensors = _full_weights(engine)
        if rank == 0:
            hf.write_folder(recipe.out / "hf", tensors, hf.read_model(folder.config), folder.vocab,
                            folder.path / "text.model", folder.visual_tokenizer, chat=True, max_len=folder.max_len)
            shutil.rmtree(checkpoints, ignore_errors=True)
    if log:
        log.__exit__(None, None, None)
    dist.barrier()
    dist.destroy_process_group()


def learning_rate(recipe: Sft, step: int) -> float:
    """Linear warmup, then cosine to min_lr_ratio of the highest. step: 0 …"""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


# DeepSpeed --------------------------------------------------------------------------------------------------------

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


def _engine(deepspeed: Any, recipe: Sft, folder: hf.Folder) -> Any:
    """The model of the folder under ZeRO."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging
    transformers_logging.disable_progress_bar()
    micro = recipe.micro_batch or recipe.global_batch // recipe.ranks
    cuda, dtype = torch.cuda.is_available(), _dtype(recipe.precision)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro, "train_batch_size": recipe.global_batch,
        "gradient_accumulation_steps": recipe.global_batch // recipe.ranks // micro,
        "gradient_clipping": recipe.clip_grad, "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": recipe.zero_stage, "overlap_comm": cuda},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled first
        "steps_per_print": 2**62, "wall_clock_breakdown": False,
    }
    keep: Any = None
    if recipe.zero_stage == 3:  # weights are split while they are read
        from transformers.integrations import HfDeepSpeedConfig
        keep = HfDeepSpeedConfig(config)
    attention = "sdpa" if cuda else "eager"  # the fused kernel is several times slower for short documents on a CPU
    causal = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, attn_implementation=attention)
    if recipe.gradient_checkpointing:
        causal.gradient_checkpointing_enable()
    model = AssistantLoss(causal).train()
    decayed = [p for p in model.parameters() if len(_shape(p)) > 1]
    others = [p for p in model.parameters() if len(_shape(p)) <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": recipe.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=recipe.lr, betas=recipe.betas)
    with _quiet():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    del keep
    return engine


def _full_weights(engine: Any) -> dict[str, Tensor]:
    """fp32 masters of all weights under their Hugging Face names; every rank takes part, all get them."""
    from deepspeed.utils import safe_get_full_fp32_param
    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        value = parameter.detach() if master is None else master
        if dist.get_rank() == 0:
            tensors[name.removeprefix("causal.")] = value.float().cpu().reshape(_shape(parameter)).clone()
    return tensors


# Checkpoints ------------------------------------------------------------------------------------------------------

def recipe_hash(recipe: Sft) -> str:
    """Of what must be the same for a checkpoint to be continued."""
    fields = {k: v for k, v in asdict(recipe).items() if k not in ("out", "save_every", "log_every")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _save(engine: Any, folder: Path, step: int, recipe: Sft, rows: Rows) -> None:
    """All ranks write theirs, then one file names the checkpoint that is whole; the one before it goes."""
    tag = f"step_{step:07d}"
    with _quiet():
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        write_json(folder / "newest.json", {"tag": tag, "step": step, "recipe_hash": recipe_hash(recipe),
                                            "plan_hash": rows.plan_hash, "consumed_rows": step * recipe.global_batch})
        for old in folder.glob("step_*"):
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)


def _resume(engine: Any, folder: Path, recipe: Sft, rows: Rows) -> int:
    """Steps already done: those of the checkpoint, if there is one. Errors: ValueError if it is another recipe's."""
    if not (folder / "newest.json").is_file():
        return 0
    newest = json.loads((folder / "newest.json").read_text())
    if (newest["recipe_hash"], newest["plan_hash"]) != (recipe_hash(recipe), rows.plan_hash):
        raise ValueError(f"{folder} was written by another recipe or on other data: "
                         "give another `out`, or delete the folder")
    with _quiet():
        loaded, _ = engine.load_checkpoint(str(folder), tag=newest["tag"])
    if loaded is None:
        raise FileNotFoundError(f"{folder / newest['tag']} is missing files: delete {folder} and start again")
    return int(newest["step"])


# Small things -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """DeepSpeed prints to the screen as well as to its logger."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


def _sum(values: list[float], device: torch.device) -> list[float]:
    """Over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _means(sums: list[float]) -> dict[str, float]:
    text, text_weight, image, image_weight = sums
    return {"loss": (text + image) / (text_weight + image_weight), "loss/text": text / max(text_weight, 1e-9),
            "loss/image": image / max(image_weight, 1e-9)}


def _dtype(precision: str) -> torch.dtype:
    """auto: bf16 only where the hardware multiplies it."""
    if precision == "auto":
        cpu: Any = torch.cpu
        native = torch.cuda.is_available() or cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, where ZeRO 3 left a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
