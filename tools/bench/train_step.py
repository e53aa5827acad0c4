"""Tokens a CPU-second of one training step: our decoder on megatron-core beside Hugging Face's of the same size, on the
same packed rows.

    OMP_NUM_THREADS=1 python tools/bench/train_step.py [--trained 0.65] [--steps 6] [--dtype fp32]

One process, so that the layers are compared and not the communication; time is the process's own (`process_time`), so
other work on the machine counts for little. A step is forward, backward, clipping and AdamW. Hugging Face gets the
better of two ways: the packed row under a block-diagonal mask, or the documents of the row as one padded batch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data.config import DataConfig
from data.loader import Row
from data.vocab import Vocab
from mmllm.config import Model, Optim, Pretrain
from mmllm.hf import model_config
from mmllm.megatron import optim, parallel
from mmllm.megatron.batch import micro_batches
from mmllm.megatron.model import build
from mmllm.megatron.step import forward_backward

VOCAB = Vocab(text_size=600, codebook_size=4096)
MODEL = Model(num_layers=4, hidden_size=128, num_attention_heads=4, ffn_hidden_size=384)


@dataclass(frozen=True)
class RandomRows:
    """Documents of 30–120 random tokens; the last part of each is trained on."""

    row_len: int
    trained: float
    vocab: Vocab = VOCAB

    def row(self, number: int) -> Row:
        draw, s = np.random.default_rng(number), self.row_len
        tokens = np.full(s, self.vocab.pad, np.int64)
        labels, weight, borders, at = tokens.copy(), np.zeros(s, np.float32), [0], 0
        while at + (n := int(draw.integers(30, 121))) <= s:
            tokens[at:at + n] = draw.integers(0, self.vocab.size, n)
            labels[at:at + n - 1] = tokens[at + 1:at + n]
            weight[at + round((1 - self.trained) * (n - 1)):at + n - 1] = 1
            at += n
            borders.append(at)
        return Row(tokens, labels, weight, np.array([*borders, *[s] * (at < s)], np.int32), ("bench",))


def ours(recipe: Pretrain, rows: RandomRows) -> Callable[[int], None]:
    layout = parallel.start(recipe.parallel, recipe.seed)
    model = optim.wrap(build(recipe, layout, VOCAB.size))
    optimizer = optim.make(recipe, model)

    def step(number: int) -> None:
        mine = [rows.row(number * recipe.global_batch + n) for n in range(recipe.global_batch)]
        forward_backward(model, micro_batches(mine, rows.vocab, recipe, layout), layout)
        optimizer.step()
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
    return step


def theirs(recipe: Pretrain, rows: RandomRows, padded: bool) -> Callable[[int], None]:
    from transformers import AutoConfig, AutoModelForCausalLM
    fields = model_config(recipe.model, VOCAB.size, 4096)
    config = AutoConfig.for_model(**{**fields, "use_cache": False}, attn_implementation="sdpa")
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optim.lr, fused=True)

    def loss_of(row: Row) -> torch.Tensor:
        labels = np.where(row.loss_weight > 0, row.labels, -100)
        if padded:
            lengths = np.diff(row.cu_seqlens)
            tokens, targets = (np.full((len(lengths), lengths.max()), fill) for fill in (VOCAB.pad, -100))
            for i, (first, n) in enumerate(zip(row.cu_seqlens, lengths, strict=False)):
                tokens[i, :n], targets[i, :n] = row.tokens[first:first + n], labels[first:first + n]
            logits = model(torch.from_numpy(tokens)).logits                     # right padding: causality hides it
            labels = targets
        else:
            document = np.repeat(np.arange(len(row.cu_seqlens) - 1), np.diff(row.cu_seqlens))
            position = np.arange(len(document)) - row.cu_seqlens[document]
            mask = torch.from_numpy((document[:, None] == document) & np.tri(len(document), dtype=bool))
            logits = model(torch.from_numpy(row.tokens)[None], position_ids=torch.from_numpy(position)[None],
                           attention_mask=mask[None, None]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="sum")

    def step(number: int) -> None:
        for i in range(recipe.global_batch):
            loss = loss_of(rows.row(number * recipe.global_batch + i)) / (recipe.global_batch * recipe.data.row_len)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return step


def measure(steps: dict[str, Callable[[int], None]], tokens: int, repeats: int) -> dict[str, float]:
    """Median tokens a CPU-second of each, taken in turn so that a busy minute of the machine meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            began = time.process_time()
            step(number)
            if number:                                                          # the first warms up
                seconds[name].append(time.process_time() - began)
    return {name: tokens / statistics.median(each) for name, each in seconds.items()}


def padding(rows: RandomRows, numbers: range) -> float:
    """Places of padded batches of the documents, by the tokens in them."""
    lengths = [np.diff(rows.row(number).cu_seqlens) for number in numbers]
    return float(sum(len(some) * some.max() for some in lengths) / sum(some.sum() for some in lengths))


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2, help="rows a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trained", type=float, default=0.65, help="part of the tokens that is trained on")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = Pretrain(out=Path(tempfile.gettempdir()), steps=1000, global_batch=options.rows, model=MODEL,
                      optim=Optim(lr=1e-3), precision=options.dtype,
                      data=DataConfig(shards=Path("none"), row_len=options.row_len))
    rows = RandomRows(options.row_len, options.trained)
    steps = {"megatron": ours(recipe, rows), "hugging face, row under a mask": theirs(recipe, rows, padded=False),
             "hugging face, padded batch": theirs(recipe, rows, padded=True)}
    found = measure(steps, options.rows * options.row_len, options.steps)
    best = max(value for name, value in found.items() if name != "megatron")
    report: dict[str, Any] = {
        **{name: round(value) for name, value in found.items()}, "ratio": round(found["megatron"] / best, 2),
        "over padded": round(found["megatron"] / found["hugging face, padded batch"], 2),
        "padded places a token": round(padding(rows, range(options.rows, options.rows * (options.steps + 1))), 2),
        **vars(options), "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    print(json.dumps(report))
    parallel.stop()
    return report


if __name__ == "__main__":
    main()
