"""What each rank of a pretraining run does, top to bottom: build or continue, then step after step.

A run that finds its own checkpoints continues from the newest and ends with the weights it would have had without the
interruption, bit for bit: nothing a step computes depends on anything but the recipe, the step's number and the
checkpoint.
"""

from __future__ import annotations

import gc
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from data.loader import Loader
from mmllm.config import CONTINUABLE, Pretrain, recipe_fields, recipe_hash
from mmllm.manifest import newest, read_state, verify
from mmllm.megatron import checkpoint, optim, parallel
from mmllm.megatron.batch import MicroBatch, Rows, micro_batches
from mmllm.megatron.loss import STATISTICS, means
from mmllm.megatron.model import build
from mmllm.megatron.parallel import Layout
from mmllm.run import Log, StopOnSignal, resident_bytes, write_json


def train(recipe: Pretrain) -> None:
    """One rank, with the recipe's own data."""
    fit(recipe, Loader(recipe.data))


def fit(recipe: Pretrain, loader: Rows) -> None:
    """One rank, given its rows."""
    layout = parallel.start(recipe.parallel, recipe.seed)
    try:
        run(recipe, loader, layout)
    finally:
        parallel.stop()


def run(recipe: Pretrain, loader: Rows, layout: Layout) -> None:
    """From the first step, or the newest checkpoint, to the last."""
    stop = StopOnSignal()
    model = optim.wrap(build(recipe, layout, loader.vocab.size))
    optimizer = optim.make(recipe, model)
    folder = recipe.out / "checkpoints"
    start_from = newest(folder)
    first = resume(start_from, recipe, loader, model, optimizer, layout) if start_from is not None else 0
    gc.freeze()  # megatron-core collects garbage at each save: 0.1 s over what was imported, which never changes

    with open_log(recipe, loader, layout, model, first) as log:
        clock, tokens_since = time.perf_counter(), 0
        for step in range(first, recipe.steps):
            batches = micro_batches(loader, recipe, layout, step)
            lr = optim.set_lr(optimizer, step, recipe)
            losses = forward_backward(model, batches, layout)
            if not all(abs(value) < float("inf") for value in losses.values()):    # inf and nan both fail
                report_bad_step(recipe, layout, step, batches, losses)
            _, grad_norm, _ = optimizer.step()
            model.zero_grad_buffer()
            optimizer.zero_grad()

            done = step + 1
            tokens_since += recipe.global_batch * loader.row_len
            stopping = stop.asked()
            last = done == recipe.steps or stopping
            if log is not None and (last or done % recipe.log_every == 0 or done == 1):
                now = time.perf_counter()
                log.record({"step": done, **losses, "lr": lr, "grad_norm": float(grad_norm or 0.0),
                            "tokens_per_s": tokens_since / (now - clock), "memory_bytes": resident_bytes(),
                            "tokens": done * recipe.global_batch * loader.row_len})
                clock, tokens_since = now, 0
            if last or (recipe.save_every and done % recipe.save_every == 0):
                checkpoint.save(folder, done, model, optimizer, {
                    "plan_hash": loader.plan_hash, "consumed_rows": done * recipe.global_batch,
                    "recipe_hash": recipe_hash(recipe), "recipe": recipe_fields(recipe),
                    "vocab_size": loader.vocab.size}, recipe.keep_last)
            if stopping:
                if log is not None:
                    log.say(f"told to stop: saved step {done}, the same command continues")
                break


def open_log(recipe: Pretrain, loader: Rows, layout: Layout, model: torch.nn.Module, first: int
             ) -> AbstractContextManager[Log | None]:
    """The first rank's log, with the recipe written and a line on what is about to run; nothing on the others."""
    if layout.rank != 0:
        return nullcontext()
    hashes = {"hash": recipe_hash(recipe), "plan_hash": loader.plan_hash}
    write_json(recipe.out / "recipe.json", {**hashes, **recipe_fields(recipe)})
    log = Log(recipe.out, recipe.steps, after_step=first, tensorboard=recipe.tensorboard, title="pretrain")
    parameters = sum(p.numel() for p in model.parameters()) * layout.tp
    log.say(f"{recipe.out}: {parameters / 1e6:,.2f} M parameters{' on this stage' if layout.pp > 1 else ''}, "
            f"{str(next(model.parameters()).dtype).removeprefix('torch.')}, dp {layout.dp} × tp {layout.tp} × pp "
            f"{layout.pp}, steps {first}–{recipe.steps} of {recipe.global_batch} rows × {loader.row_len:,} tokens")
    return log


def forward_backward(model: DistributedDataParallel, batches: list[MicroBatch], layout: Layout) -> dict[str, float]:
    """Every micro-batch of a step through megatron-core's schedule; gradients are ready, the global batch's losses
    returned to all."""

    def forward_step(iterator: Any, part: Any) -> tuple[Any, Any]:
        batch: MicroBatch = next(iterator)
        output = part(batch.tokens, None, None, labels=batch.targets, packed_seq_params=batch.packed)
        if not layout.last_stage:
            return output, None
        loss, statistics = output

        # loss, tokens to divide by (already done), to collect
        def report(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return loss, torch.zeros((), dtype=torch.int, device=layout.device), statistics
        return loss, report

    reported = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[model], num_microbatches=len(batches),
        seq_length=batches[0].tokens.size(1), micro_batch_size=1, forward_only=not torch.is_grad_enabled())
    sums = torch.stack(reported).sum(0) if reported else torch.zeros(len(STATISTICS), device=layout.device)
    if layout.dp > 1:
        dist.all_reduce(sums, group=parallel.data_group())
    if layout.pp > 1:
        dist.all_reduce(sums, group=parallel.pipeline_group())                 # zeros but on the last stage
    return means(sums.tolist())


def resume(start_from: Path, recipe: Pretrain, loader: Rows, model: DistributedDataParallel,
           optimizer: ChainedOptimizer, layout: Layout) -> int:
    """Continue from a checkpoint, unless something that decides the numbers has changed; returns its step."""
    problem = [""]
    # one rank reads it all; the others hear the verdict
    if layout.rank == 0:
        try:
            verify(start_from)
        except (ValueError, FileNotFoundError) as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])
    saved = read_state(start_from)
    differing = list[str]()
    if saved["plan_hash"] != loader.plan_hash:
        differing.append(f"data order (plan {saved['plan_hash']} then, {loader.plan_hash} now)")
    if saved["recipe_hash"] != recipe_hash(recipe):
        then, now = saved["recipe"], recipe_fields(recipe)
        differing += [f"{name} ({then.get(name)} then, {now[name]} now)" for name in now
                      if now[name] != then.get(name) and name not in CONTINUABLE]
    if differing and not recipe.accept_changes:
        raise ValueError(f"{start_from} was written by another recipe: {'; '.join(differing)}. "
                         "Give another `out`, delete the folder, or set accept_changes")
    checkpoint.load(start_from, model, optimizer)
    step: int = saved["step"]
    return step


def report_bad_step(recipe: Pretrain, layout: Layout, step: int, batches: list[MicroBatch],
                    losses: dict[str, float]) -> None:
    """Save what this rank was computing, and stop."""
    path = recipe.out / f"bad_step_{step:07d}_rank_{layout.rank}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for batch in batches for row in batch.rows]
    torch.save({"step": step, "rank": layout.rank, "losses": losses,
                "rows": [{"keys": row.keys, "tokens": row.tokens, "labels": row.labels, "loss_weight": row.loss_weight,
                          "cu_seqlens": row.cu_seqlens} for row in rows]}, path)
    keys = [key for row in rows for key in row.keys]
    named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise FloatingPointError(f"step {step}, rank {layout.rank}: the loss is not finite ({losses}); its samples "
                             f"are {named}; the batch is saved in {path}")
