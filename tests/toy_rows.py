"""Packed rows of random documents from a real vocabulary, and what the ranks of several tests run on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.loader import Row
from data.vocab import Vocab
from mmllm.config import Model, Optim, Parallel, Pretrain

VOCAB = Vocab(text_size=60, codebook_size=100, grids=((2, 2),))
TINY = Model(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48)


@dataclass(frozen=True)
class ToyRows:
    """Documents of 5–60 tokens, a third of each a prompt, text first and image codes after."""

    vocab: Vocab = VOCAB
    row_len: int = 256

    def state(self, consumed_rows: int) -> dict[str, Any]:
        return {"plan_hash": "toy", "consumed_rows": consumed_rows}

    def resume(self, state: Mapping[str, Any]) -> None:
        assert state["plan_hash"] == "toy"

    def row(self, number: int) -> Row:
        draw, vocab = np.random.default_rng(number), self.vocab
        tokens, labels = (np.full(self.row_len, vocab.pad, np.int64) for _ in range(2))
        weight, borders, at = np.zeros(self.row_len, np.float32), [0], 0
        while at + (length := int(draw.integers(5, 60))) <= self.row_len:
            document = np.concatenate([[vocab.bos], draw.integers(0, 8, length // 2), draw.integers(
                vocab.first_image, vocab.first_image + 8, length - 1 - length // 2)])
            tokens[at:at + length], labels[at:at + length - 1] = document, document[1:]
            weight[at + length // 3:at + length - 1] = 1
            at += length
            borders.append(at)
        borders += [self.row_len] * (at < self.row_len)
        return Row(tokens, labels, weight, np.array(borders, np.int32), (f"toy-{number}",))


def tiny(out: Path, **changes: Any) -> Pretrain:
    """A recipe that runs in seconds."""
    recipe = Pretrain(
        out=out, steps=20, global_batch=4, seed=3, precision="fp32", log_every=1, image_loss_weight=0.5, model=TINY,
        optim=Optim(lr=3e-3, warmup_steps=4), data=DataConfig(shards=Path("toy"), row_len=256))
    return replace(recipe, **changes)


def train(recipe: Pretrain) -> None:
    """What the ranks of a test run in place of `mmllm.megatron.train.train`."""
    from mmllm.megatron.train import fit
    fit(recipe, ToyRows())


def losses_by_layout(job: tuple[Pretrain, dict[str, Parallel]]) -> None:
    """Train from one checkpoint under each layout in turn; rank 0 writes {name: {name of loss: [a value a step]}}. Each saves what it
    loaded to `again/NAME`.

    The checkpoint is `recipe.out`'s; if there is none, four steps under the first layout make it."""
    recipe, layouts = job
    from mmllm.manifest import newest
    from mmllm.megatron import checkpoint, optim, parallel
    from mmllm.megatron.batch import micro_batches
    from mmllm.megatron.model import build
    from mmllm.megatron.step import forward_backward
    from mmllm.megatron.train import rows_of, run
    from mmllm.run import StopOnSignal
    first = next(iter(layouts.values()))
    start = newest(recipe.out / "checkpoints")
    if start is None:
        with StopOnSignal() as stop:
            run(replace(recipe, steps=4, parallel=first), ToyRows(), parallel.start(first, 0), stop)
        start = recipe.out / "checkpoints" / "step_0000004"
    found: dict[str, dict[str, list[float]]] = {}
    for name, widths in layouts.items():
        # other new weights: the checkpoint's must win
        here = replace(recipe, parallel=widths, seed=recipe.seed + 1)
        layout = parallel.split_again(widths, 0)
        model = optim.wrap(build(here, layout, VOCAB.size))
        optimizer = optim.make(here, model)
        checkpoint.load(start, model, optimizer)
        checkpoint.save(recipe.out / "again" / name.replace(" ", "-"), 4, model, optimizer, {}, 1)
        found[name] = {}
        for step in range(recipe.steps):
            optim.set_lr(optimizer, step, here)
            rows = [ToyRows().row(n) for n in rows_of(here, step, layout)]
            losses = forward_backward(model, micro_batches(rows, VOCAB, here, layout), layout)
            _, grad_norm, _ = optimizer.step()
            for chunk in model:
                chunk.zero_grad_buffer()
            for key, value in {**losses, "grad_norm": float(grad_norm or 0)}.items():
                found[name].setdefault(key, []).append(value)
        if layout.rank == 0:
            (recipe.out / f"losses_{layout.ranks}.json").write_text(json.dumps(found))
    parallel.stop()


def fail_on_rank_one(message: str) -> None:
    """One rank raises; the other would wait for ever."""
    import os
    import time
    if os.environ["RANK"] == "1":
        raise KeyError(message) if message else SystemExit(os.kill(os.getpid(), 9))
    time.sleep(600)


def refuse_on_rank_one(message: str) -> None:
    """One rank finds its input wrong; the other would wait for ever."""
    import os
    import time
    if os.environ["RANK"] == "1":
        raise FileNotFoundError(message)
    time.sleep(600)


def write_when_terminated(path: str) -> None:
    """Each rank leaves a file once it is told to stop."""
    import os
    import signal
    import time
    rank = os.environ["RANK"]

    def leave(*_: Any) -> None:
        Path(path, f"stopped-{rank}").touch()
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, leave)
    Path(path, f"ready-{rank}").touch()
    time.sleep(600)
