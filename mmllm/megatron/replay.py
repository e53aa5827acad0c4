"""A dumped step again, document by document: which of them made it what it was.

Documents of a packed row do not see each other, so each is run alone through the weights of a checkpoint and gives what it gave in the
batch: its part of the loss, and, on one rank, the norm of the gradient it alone would cause.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from data.config import DataConfig
from data.loader import Row
from data.vocab import Vocab
from mmllm.config import Optim, Parallel, Pretrain
from mmllm.manifest import read_state
from mmllm.megatron import checkpoint, optim, parallel
from mmllm.megatron.batch import micro_batches, weight_of
from mmllm.megatron.dump import read
from mmllm.megatron.metrics import documents
from mmllm.megatron.model import build
from mmllm.megatron.step import forward_backward
from mmllm.run import write_json
from mmllm.runs.replay import Replay
from mmllm.weights import read_model

ALIGN = 128
"""Tokens that a document is padded to a multiple of, for every tensor-parallel width and FP8 recipe."""


def replay(job: Replay) -> None:
    """One rank: every document of the step, worst first, to `found`."""
    saved, rows = read(job.step)
    vocab, before = Vocab.of(saved["vocab"]), read_state(job.checkpoint)
    shape, vocab_size = read_model(job.checkpoint)
    if vocab_size != vocab.size:
        raise ValueError(f"{job.step} has a vocabulary of {vocab.size:,} ids, {job.checkpoint} one of {vocab_size:,}: they are of two runs")
    told: dict[str, Any] = before["recipe"]
    recipe = Pretrain(
        out=job.found.parent, steps=1, global_batch=1, model=shape, data=DataConfig(row_len=ALIGN), precision=told["precision"],
        optim=Optim(lr=1.0, z_loss=told["optim"]["z_loss"]), parallel=Parallel(ranks=job.tp, tp=job.tp),
        text_loss_weight=told["text_loss_weight"], image_loss_weight=told["image_loss_weight"])
    layout = parallel.start(recipe.parallel, 0)
    try:
        model = optim.wrap(build(recipe, layout, vocab.size))
        checkpoint.load(job.checkpoint, model, None)
        alone = [document for row in rows for document in split(row, vocab)]
        weights = [float(weight_of(document, vocab, recipe).sum(dtype=np.float64)) for document in alone]
        whole = sum(weight for weight in weights if math.isfinite(weight))
        found = list[dict[str, Any]]()
        for document, weight in zip(alone, weights, strict=True):
            if weight == 0:
                continue
            for chunk in model:
                chunk.zero_grad_buffer()
            with torch.set_grad_enabled(job.tp == 1):
                losses = forward_backward(model, micro_batches([document], vocab, recipe, layout), layout)
            part = {"key": document.keys[0], "tokens": int(document.cu_seqlens[1]), **losses, "of_step": losses["loss"] * weight / whole}
            if job.tp == 1:
                squares = sum(float(gradient.double().square().sum()) for chunk in model for gradient in gradients(chunk))
                part["gradient"] = math.sqrt(squares) * weight / whole if math.isfinite(squares) else math.nan
            found.append(part)
        if layout.rank == 0:
            write_json(job.found, {"step": saved["step"], "checkpoint_step": before["step"], "then": saved["losses"],
                                   "documents": sorted(found, key=weighs, reverse=True)})
    finally:
        parallel.stop()


def gradients(chunk: Any) -> list[torch.Tensor]:
    """Where megatron-core sums them."""
    return [parameter.main_grad for parameter in chunk.parameters()]


def weighs(part: dict[str, Any]) -> float:
    """What documents are listed by: the gradient where there is one, else the loss; what is not a number first."""
    value: float = part.get("gradient", part["of_step"])
    return value if math.isfinite(value) else math.inf


def split(row: Row, vocab: Vocab) -> list[Row]:
    """A row's documents, each as a row of its own with padding behind it. A row knows a key for each, or one for all."""
    out = list[Row]()
    for number, length in enumerate(documents(row, vocab.pad).tolist()):
        first = int(row.cu_seqlens[number])
        inside = slice(first, first + length)
        padding = -length % ALIGN
        borders = [0, length, *([length + padding] if padding else [])]
        out.append(Row(tokens=np.pad(row.tokens[inside], (0, padding), constant_values=vocab.pad),
                       labels=np.pad(row.labels[inside], (0, padding), constant_values=vocab.pad),
                       loss_weight=np.pad(row.loss_weight[inside], (0, padding)), cu_seqlens=np.array(borders, np.int32),
                       keys=(row.keys[min(number, len(row.keys) - 1)],) if row.keys else ("",)))
    return out
