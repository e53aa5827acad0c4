"""Tune a Hugging Face folder on conversations with DeepSpeed ZeRO: the loop, top to bottom.

`main` checks the recipe and starts the ranks (under torchrun it is one); `train` is what each rank does; the result is
another Hugging Face folder, `out/hf`, or, when the run was told to stop, a checkpoint that the same command continues.
"""

import math
import os
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.chat import ChatLoader
from data.config import DataConfig
from data.encode import fingerprint
from data.loader import Loader
from data.order import Group
from data.prefetch import prefetched
from mmllm import hf, launch, manifest
from mmllm.run import Log, StopOnSignal, resident_bytes, resolve_precision, seed_all, write_json
from mmllm.runs import sft_checkpoint, sft_engine, sft_loss
from mmllm.runs.sft_checkpoint import Rows
from mmllm.runs.sft_lora import ADAPTER, merged, write_adapter
from mmllm.runs.sft_recipe import Sft, fields_of, learning_rate, recipe_hash, violations


def check(recipe: Sft) -> None:
    """Refuse a recipe that cannot work, with every reason at once."""
    if found := violations(recipe):
        raise ValueError("the recipe cannot work:\n" + "\n".join(f"  - {line}" for line in found))
    hf.check_target(recipe.out / "hf")
    if recipe.lora.rank:
        hf.check_target(recipe.out / "adapter", ADAPTER)


def main(recipe: Sft) -> Path:
    """Tune to `recipe.steps`. → the tuned model folder."""
    check(recipe)
    folder = hf.open_folder(recipe.init)
    for config in [recipe.data] + [recipe.held_out] * bool(recipe.validate_every):
        conversations(recipe, folder, config)  # what is wrong with them is said before ranks start
    if launch.under_torchrun():
        if int(os.environ["WORLD_SIZE"]) != recipe.ranks:
            raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} ranks, the recipe has ranks {recipe.ranks}")
        train(recipe)
    else:
        launch.launch("mmllm.runs.sft_ranks:train", recipe, recipe.ranks)
    if manifest.newest(recipe.out / "checkpoints") is not None:
        raise SystemExit(launch.STOPPED)  # told to stop, saved, to be continued
    return recipe.out / "hf"


def train(recipe: Sft) -> None:
    """One rank: model folder and conversations, then `fit`."""
    folder = hf.open_folder(recipe.init)
    with StopOnSignal() as stop:
        held = conversations(recipe, folder, recipe.held_out) if recipe.validate_every else None
        fit(recipe, folder, conversations(recipe, folder, recipe.data), held, stop)


def conversations(recipe: Sft, folder: hf.Folder, config: DataConfig) -> Rows:
    """Rows from token shards. Errors: ValueError for shards that other tokenizers made."""
    made_by = fingerprint(hf.fingerprint(folder.visual_tokenizer), folder.text.fingerprint, folder.vocab)
    loader, first_shard = Loader(config, made_by, lambda step: step * recipe.global_batch), Group((0,), 0, 0)
    if recipe.conversations == "as they are" or (recipe.conversations == "auto" and any(
            source.read(first_shard).turns.any() for source in loader.plan.sources)):
        return loader
    return ChatLoader(config, folder.text.encode, made_by)


def fit(recipe: Sft, folder: hf.Folder, rows: Rows, held: Rows | None, stop: StopOnSignal) -> None:
    """One rank, given its rows: join, step after step, write the folder."""
    deepspeed = sft_engine.load_deepspeed()
    launch.join()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    seed_all(recipe.seed)
    rank, each, checkpoints = dist.get_rank(), recipe.global_batch // recipe.ranks, recipe.out / "checkpoints"
    engine = sft_engine.build(deepspeed, recipe, folder)
    first = sft_checkpoint.resume(engine, checkpoints, recipe, rows)
    own_rows = prefetched(rows, (step * recipe.global_batch + rank * each + i for step in range(first, recipe.steps)
                                 for i in range(each)), recipe.loader_workers)
    with open_log(recipe, rows, engine, first) if rank == 0 else nullcontext() as log:
        clock, tokens = time.perf_counter(), 0
        for step in range(first, recipe.steps):
            own = list(islice(own_rows, each))
            # the sum over all ranks decides the scale of each one's loss: a mean over tokens, whoever holds them
            total, stopping = _sum([float(sum(row.loss_weight.sum() for row in own)), float(stop.received)], engine.device)
            if total == 0:
                raise ValueError(f"step {step}: none of the {recipe.global_batch} rows has a token of the assistant")
            lr = learning_rate(recipe, step)
            for parameters in engine.optimizer.param_groups:
                parameters["lr"] = lr
            if recipe.lora.dropout:  # what is dropped depends on step and rank alone, not on when the run began
                torch.manual_seed((recipe.seed * 1_000_003 + step) * recipe.ranks + rank)
            statistics = torch.zeros(4, device=engine.device)
            for groups in batches(own, recipe, engine.device):
                loss, sums = engine(groups, rows.vocab.first_image)
                statistics += sums
                # ZeRO averages over ranks; the loss is already divided by the weight of all of them
                engine.backward(loss * (recipe.ranks / total), scale_wrt_gas=False)
                engine.step()
            values, norm = _means(_sum(statistics.tolist(), engine.device)), engine.get_global_grad_norm()
            if norm is not None:  # without ZeRO, DeepSpeed keeps it to itself
                values["grad_norm"] = float(norm)
            if not all(map(math.isfinite, values.values())):
                keys = ", ".join([key for row in own for key in row.keys][:20])
                raise FloatingPointError(f"step {step}, rank {rank}: loss or gradient is not finite ({values}); samples begin with {keys}")
            done = step + 1
            tokens += recipe.global_batch * rows.row_len
            if held is not None and (done % recipe.validate_every == 0 or done == recipe.steps):
                began = time.perf_counter()
                values |= {f"validation/{name}": value for name, value in validate(engine, held, recipe, rank).items()}
                clock += time.perf_counter() - began
            if log and (done % recipe.log_every == 0 or done in (first + 1, recipe.steps) or "validation/loss" in values):
                now = time.perf_counter()
                log.record({"step": done, **values, "lr": lr, "tokens_per_s": tokens / (now - clock), "memory_bytes": resident_bytes()})
                clock, tokens = now, 0
            if done < recipe.steps and (stopping or (recipe.save_every and done % recipe.save_every == 0)):
                sft_checkpoint.save(engine, checkpoints, done, recipe, rows)
                if stopping:
                    if log:
                        log.say(f"told to stop: saved step {done}, the same command continues")
                    break
        else:
            write(deepspeed, engine, recipe, folder)
    dist.barrier()
    dist.destroy_process_group()


def open_log(recipe: Sft, rows: Rows, engine: Any, first: int) -> Log:
    """The recipe written, and a line on what is about to run."""
    write_json(recipe.out / "recipe.json", {"hash": recipe_hash(recipe), "plan_hash": rows.state(0)["plan_hash"], **fields_of(recipe)})
    log = Log(recipe.out, recipe.steps, after_step=first, tensorboard=recipe.tensorboard, title="tune")
    trained, other = (sum(sft_engine.count(p) for p in engine.module.parameters() if p.requires_grad == wanted) for wanted in (True, False))
    log.say(f"{recipe.out}: {trained + other:,} parameters{f', {trained:,} of them trained' if other else ''}, ZeRO {recipe.zero_stage} on "
            f"{recipe.ranks} ranks, {str(resolve_precision(recipe.precision))[6:]}, steps {first}–{recipe.steps}, conversations "
            f"{'from pairs' if isinstance(rows, ChatLoader) else 'as they are'}")
    return log


def batches(own: list[Any], recipe: Sft, device: torch.device) -> list[list[sft_loss.Group]]:
    """Groups of each micro-batch. Under ZeRO 3 every rank has as many: each group makes the weights whole, which takes all ranks."""
    out = [sft_loss.document_groups(own[at:at + recipe.micro]) for at in range(0, len(own), recipe.micro)]
    if recipe.zero_stage == 3 and recipe.ranks > 1:
        most = torch.tensor([len(groups) for groups in out], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        out = [groups + [sft_loss.nothing()] * (wanted - len(groups)) for groups, wanted in zip(out, most.tolist(), strict=True)]
    return [[sft_loss.on(device, group) for group in groups] for groups in out]


@torch.no_grad()
def validate(engine: Any, held: Rows, recipe: Sft, rank: int) -> dict[str, float]:
    """Losses by modality over held-out rows 0 … `validation_rows`, over all ranks. Nothing that training goes on with is touched."""
    own = [held.row(number) for number in range(rank, recipe.validation_rows, recipe.ranks)]
    statistics = torch.zeros(4, device=engine.device)
    engine.eval()
    for groups in batches(own, recipe, engine.device):
        statistics += engine(groups, held.vocab.first_image)[1]
    engine.train()
    return _means(_sum(statistics.tolist(), engine.device))


def write(deepspeed: Any, engine: Any, recipe: Sft, folder: hf.Folder) -> None:
    """The tuned model, adapters merged, as a folder; then checkpoints are not needed."""
    tensors, vocab = sft_engine.full_weights(deepspeed, engine), folder.vocab
    if dist.get_rank() == 0:
        if recipe.lora.rank:
            write_adapter(recipe.out / "adapter", tensors, recipe, range(vocab.text_size, vocab.size))
            tensors = merged(tensors, recipe)
        precision = resolve_precision(recipe.export_precision)
        hf.write_folder(recipe.out / "hf", {name: tensor.to(precision) for name, tensor in tensors.items()}, folder.model, vocab,
                        folder.path / "text.model", folder.visual_tokenizer, chat=True, max_len=folder.max_len)
        if (checkpoints := recipe.out / "checkpoints").exists():
            manifest.delete(checkpoints)


def _sum(values: list[float], device: torch.device) -> list[float]:
    """Over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _means(sums: list[float]) -> dict[str, float]:
    text, text_weight, image, image_weight = sums
    return {"loss": (text + image) / (text_weight + image_weight), "loss/text": text / max(text_weight, 1e-9),
            "loss/image": image / max(image_weight, 1e-9)}
