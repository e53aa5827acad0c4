"""What each rank of a pretraining run does, top to bottom: build or continue, then step after step.

A run that finds its own checkpoints continues from the newest and ends with the weights it would have had without the
interruption, bit for bit: nothing a step computes depends on anything but the recipe, the step's number and the
checkpoint.

What may go wrong in a step is decided on all ranks at once, by one reduction before the weights move: a signal to stop, a spike, a
checkpoint that is still being written.
"""

from __future__ import annotations

import gc
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from data.loader import Loader, Row
from data.prefetch import prefetched
from mmllm import spikes
from mmllm.config import Pretrain, batch_at, recipe_fields, recipe_hash, rows_before
from mmllm.manifest import find
from mmllm.megatron import checkpoint, metrics, optim, parallel, warm
from mmllm.megatron.batch import Rows, micro_batches
from mmllm.megatron.checkpoint import SaveFailed, Saving
from mmllm.megatron.dump import dump
from mmllm.megatron.model import build
from mmllm.megatron.parallel import Layout
from mmllm.megatron.resume import resume
from mmllm.megatron.step import forward_backward
from mmllm.megatron.validate import held_out, validate
from mmllm.plan.parameters import whole
from mmllm.run import Log, StopOnSignal, highest, write_json
from mmllm.watchdog import Watchdog


def train(recipe: Pretrain) -> None:
    """One rank, with the recipe's own data."""
    loader = Loader(recipe.data, first_row=lambda step: rows_before(recipe, step))
    if recipe.vocab_size not in (None, loader.vocab.size):
        raise ValueError(f"the shards have {loader.vocab.size:,} ids, the recipe says vocab_size {recipe.vocab_size:,}: take the right "
                         "shards, or set vocab_size")
    fit(recipe, loader, held_out(recipe, loader) if recipe.validate_every else None)


def fit(recipe: Pretrain, loader: Rows, held: Rows | None = None) -> None:
    """One rank, given its rows, and those held out."""
    layout = parallel.start(recipe.parallel, recipe.seed)
    try:
        with StopOnSignal() as stop:
            run(recipe, loader, layout, stop, held)
    finally:
        parallel.stop()


def run(recipe: Pretrain, loader: Rows, layout: Layout, stop: StopOnSignal, held: Rows | None = None) -> None:
    """From the first step, or the newest checkpoint, to the last."""
    model = optim.wrap(build(recipe, layout, loader.vocab.size))
    optimizer = optim.make(recipe, model)
    start_from = find(recipe.out / "checkpoints")
    saved = resume(start_from, recipe, loader, model, optimizer) if start_from is not None else {"step": 0}
    if start_from is None and recipe.init is not None:
        warm.start(recipe.init, loader.vocab, model, optimizer, layout)
    first, seen, saving = int(saved["step"]), spikes.seen_before(saved), None
    rows = prefetched(loader, (n for step in range(first, recipe.steps) for n in rows_of(recipe, step, layout)), recipe.loader_workers)
    peak = metrics.peak_tflops(recipe, layout)
    gc.freeze()  # megatron-core collects garbage at each save: 0.1 s over what was imported, which never changes

    with Watchdog(recipe.out, layout.rank, recipe.hang_timeout_s) as watchdog, open_log(recipe, loader, layout, model, first, peak) as log:
        pace = metrics.Pace()
        for step in range(first, recipe.steps):
            done = step + 1
            watchdog.beat(f"step {done}")
            mine = list(islice(rows, batch_at(recipe, step) // layout.dp))
            lr = optim.set_lr(optimizer, step, recipe)
            losses = forward_backward(model, micro_batches(mine, loader.vocab, recipe, layout), layout)
            norm = optim.gradient_norm(optimizer)
            measures = {**losses, "grad_norm": norm}
            bad, why = spikes.not_finite(measures), spikes.spike(seen, losses["loss"], norm, recipe.spikes)
            stopping, odd, writing = highest([stop.received, bool(why), saving is not None and not checkpoint.written(saving)])
            last = done == recipe.steps or bool(stopping)
            if saving is not None and (bad or odd or last or not writing):
                saving = settle(saving, recipe, log)
            if bad:
                path, keys = dump(recipe, loader.vocab, layout, step, mine, measures)
                raise FloatingPointError(f"step {step}, rank {layout.rank}: {' and '.join(bad)} not finite ({measures}); its samples are "
                                         f"{keys}; the batch is saved in {path}")
            if odd:
                seen = spikes.skipped(seen)
                measures |= report_spike(recipe, loader, layout, log, seen, step, mine, measures, why)
            else:
                optim.update(optimizer, norm)
                seen = spikes.accepted(seen, losses["loss"], norm, recipe.spikes)
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()

            metrics.add(pace, mine, loader.vocab, recipe)
            if held is not None and recipe.validate_every and (done % recipe.validate_every == 0 or done == recipe.steps):
                watchdog.beat(f"validation after step {done}")
                began = time.perf_counter()
                measures |= validate(model, held, recipe, layout)
                pace.began += time.perf_counter() - began
            if last or odd or done % recipe.log_every == 0 or done == 1 or any(name.startswith("validation") for name in measures):
                speed = metrics.throughput(pace, layout, peak)
                if log is not None:
                    consumed = rows_before(recipe, done)
                    log.record({"step": done, **measures, "lr": lr, **speed, "memory_bytes": metrics.memory_bytes(layout),
                                "tokens": consumed * loader.row_len, **metrics.position(loader, consumed)})
                pace = metrics.Pace()
            if last or (recipe.save_every and done % recipe.save_every == 0):
                watchdog.beat(f"the checkpoint after step {done}")
                if saving is not None:
                    settle(saving, recipe, log)
                saving = save(recipe, loader, model, optimizer, done, seen, log, last)
            if stopping:
                if log is not None:
                    log.say(f"told to stop: saved step {done}, the same command continues")
                break


def rows_of(recipe: Pretrain, step: int, layout: Layout) -> range:
    """The rows of one rank in one step: rank r of D takes the r-th of D equal parts of the step's rows."""
    each = batch_at(recipe, step) // layout.dp
    first = rows_before(recipe, step) + layout.dp_rank * each
    return range(first, first + each)


def open_log(recipe: Pretrain, loader: Rows, layout: Layout, model: list[DistributedDataParallel], first: int, peak: float | None
             ) -> AbstractContextManager[Log | None]:
    """The first rank's log, with the recipe written and a line on what is about to run; nothing on the others."""
    if layout.rank != 0:
        return nullcontext()
    hashes = {"hash": recipe_hash(recipe), "plan_hash": loader.state(0)["plan_hash"]}
    write_json(recipe.out / "recipe.json", {**hashes, **recipe_fields(recipe)})
    log = Log(recipe.out, recipe.steps, after_step=first, tensorboard=recipe.tensorboard, title="pretrain", wandb=recipe.wandb,
              recipe=recipe_fields(recipe))
    parameters = whole(recipe.model, recipe.model.vocab_rows(loader.vocab.size)).total
    log.say(f"{recipe.out}: {parameters / 1e6:,.2f} M parameters, "
            f"{str(next(model[0].parameters()).dtype).removeprefix('torch.')}, dp {layout.dp} × tp {layout.tp} × pp "
            f"{layout.pp}, steps {first}–{recipe.steps} of {batch_at(recipe, first)} rows × {loader.row_len:,} tokens"
            + (f", MFU of {peak:g} TFLOP/s" if peak else ""))
    return log


def save(recipe: Pretrain, loader: Rows, model: list[DistributedDataParallel], optimizer: ChainedOptimizer, done: int,
         seen: spikes.Seen, log: Log | None, last: bool) -> Saving | None:
    """Save what a continued run needs after `done` steps; the last one of a run at once. → the saving that goes on, if any"""
    state = {**loader.state(rows_before(recipe, done)), "recipe_hash": recipe_hash(recipe), "recipe": recipe_fields(recipe),
             "vocab_size": loader.vocab.size, "spikes": vars(seen)}
    background = recipe.async_save and not last
    try:
        saving = checkpoint.begin(recipe.out / "checkpoints", done, model, optimizer, state, background)
        if background:
            return saving
        checkpoint.complete(saving, recipe.keep_last, recipe.keep_every)
    except SaveFailed as error:
        if last:
            raise
        go_on(error, recipe, log)
    return None


def settle(saving: Saving, recipe: Pretrain, log: Log | None) -> None:
    """Name a checkpoint that is written, or report one that could not be."""
    try:
        checkpoint.complete(saving, recipe.keep_last, recipe.keep_every)
    except SaveFailed as error:
        go_on(error, recipe, log)


def go_on(error: SaveFailed, recipe: Pretrain, log: Log | None) -> None:
    """By the recipe's rule, after a checkpoint that could not be written."""
    if recipe.failed_save == "stop":
        raise error
    if log is not None:
        log.say(f"{error}: the run goes on and tries again when the next is due (failed_save)")


def report_spike(recipe: Pretrain, loader: Rows, layout: Layout, log: Log | None, seen: spikes.Seen, step: int, mine: list[Row],
                 measures: dict[str, float], why: str) -> dict[str, Any]:
    """Save the batch of a spike; then skip it, or stop. → what to put into the step's record"""
    path, keys = dump(recipe, loader.vocab, layout, step, mine, measures)
    line = f"step {step + 1}: {why}; its samples are {keys}; the batch is saved in {path}"
    if recipe.spikes.rule == "stop":
        raise FloatingPointError(line)
    if seen.in_a_row > recipe.spikes.in_a_row:
        raise FloatingPointError(f"{line}; it is spike number {seen.in_a_row} in a row, spikes.in_a_row allows {recipe.spikes.in_a_row}")
    if log is not None:
        log.say(f"{line}; its update is skipped")
    return {"skipped": seen.skipped, "spike": why, "samples": keys}
