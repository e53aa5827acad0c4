"""From packed rows to what one forward pass takes.

Row n is the same whoever asks, so nothing is broadcast: every rank of a tensor-, pipeline- or context-parallel group reads
the rows of its data-parallel rank itself. Rank r of D, step t, G rows a step: rows t·G + r·G/D … t·G + (r+1)·G/D − 1.

Letters: s tokens in a row, t tokens of a micro-batch (micro_batch rows end to end), d documents, m tokens trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.loader import Row
from data.vocab import Vocab
from mmllm.config import Pretrain
from mmllm.megatron.attention import PackedRow
from mmllm.megatron.buckets import STEP, pack
from mmllm.megatron.context import lengthened, pack_shared, share
from mmllm.megatron.loss import Targets
from mmllm.megatron.parallel import Layout, context_group, data_group
from mmllm.megatron.rope import grid_positions, row_positions


class Rows(Protocol):
    """What training asks of a loader."""

    vocab: Vocab
    row_len: int

    def row(self, number: int, /) -> Row: ...
    def state(self, consumed_rows: int, /) -> dict[str, Any]: ...
    def resume(self, state: Mapping[str, Any], /) -> None: ...


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass."""

    tokens: Tensor
    """[1, t], or this rank's share of it"""
    targets: Targets
    packed: PackedRow
    rows: tuple[Row, ...]
    """Where it came from, for a report."""


def join_borders(rows: Sequence[Row], pad: int, device: torch.device) -> NDArray[np.int32]:
    """Document borders of rows laid end to end, [d + 1]. On a CPU a tail of padding becomes many short documents:
    attending over it as one costs as much as the rest of the row, and its outputs are never used."""
    borders, start = [np.zeros(1, np.int64)], 0
    for row in rows:
        inside = row.cu_seqlens[1:].astype(np.int64)
        tail = int(row.cu_seqlens[-2])
        if device.type == "cpu" and row.tokens[tail] == pad:
            inside = np.concatenate([inside[:-2], np.arange(tail, len(row.tokens), STEP), inside[-1:]])
        borders.append(inside + start)
        start += len(row.tokens)
    return np.unique(np.concatenate(borders)).astype(np.int32)


def weight_of(row: Row, vocab: Vocab, recipe: Pretrain) -> NDArray[np.floating]:
    """What each token's prediction counts in the loss [s], before it is divided by the whole batch's."""
    return row.loss_weight * np.where(row.labels >= vocab.first_image, recipe.image_loss_weight, recipe.text_loss_weight)


def micro_batches(rows: Sequence[Row], vocab: Vocab, recipe: Pretrain, layout: Layout) -> list[MicroBatch]:
    """Everything this rank computes in one step, given its rows; the loss weights already divided by the whole global batch's
    weight."""
    weights = [weight_of(row, vocab, recipe) for row in rows]
    mine = sum(float(weight.sum(dtype=np.float64)) for weight in weights)
    filled = sum(int((row.tokens != vocab.pad).sum()) for row in rows) if recipe.model.num_experts else 0
    total = torch.tensor([mine, filled], dtype=torch.float64, device=layout.device)
    if layout.dp > 1:
        dist.all_reduce(total, group=data_group())
    whole, balance_tokens = (max(value, 1e-9) for value in total.tolist())
    parts = [slice(i, i + recipe.micro_batch) for i in range(0, len(rows), recipe.micro_batch)]
    borders = [join_borders(rows[part], vocab.pad, layout.device) for part in parts]
    # the micro-batches of a pipeline have one length, and its stages see the same rows
    length = max(shared_len(each, recipe) for each in borders) if layout.cp > 1 else 0
    return [micro_batch(rows[part], weights[part], whole, balance_tokens, each, length, vocab, recipe, layout)
            for part, each in zip(parts, borders, strict=True)]


def shared_len(borders: NDArray[np.int32], recipe: Pretrain) -> int:
    """Tokens of a micro-batch whose documents are lengthened to be shared by context-parallel ranks, aligned for the others and
    for FP8."""
    parallel = recipe.parallel
    multiple = 2 * parallel.cp * recipe.fp8.alignment * (parallel.tp if parallel.sequence_parallel else 1)
    needed = int((-(-np.diff(borders) // (2 * parallel.cp)) * (2 * parallel.cp)).sum())
    return -(-needed // multiple) * multiple


def micro_batch(rows: Sequence[Row], weights: Sequence[NDArray[np.floating]], whole: float, balance_tokens: float,
                borders: NDArray[np.int32], length: int, vocab: Vocab, recipe: Pretrain, layout: Layout) -> MicroBatch:
    """Rows laid end to end as one forward pass: all of it, or this rank's share of the tokens."""
    device, cp, on_cpu = layout.device, layout.cp, layout.device.type == "cpu"
    weight, tokens = np.concatenate(weights), np.concatenate([row.tokens for row in rows])
    where = np.flatnonzero(weight)                                             # [m]
    labels = np.concatenate([row.labels for row in rows])[where]
    counted = np.concatenate([row.loss_weight for row in rows])[where].astype(np.float32)
    weight = (weight[where] / whole).astype(np.float32)
    if cp > 1:
        borders, place = lengthened(borders, cp, length, tail=int(np.lcm(STEP, 2 * cp)) if on_cpu else length)
        longer = np.full(length, vocab.pad, np.int64)
        longer[place] = tokens                                                 # [t] -> [length]
        tokens, where = longer, place[where]
    grid = grid_positions(tokens, borders, vocab) if recipe.model.image_positions == "grid" else None
    packing, mine = None, slice(None)
    if cp > 1:
        if on_cpu:
            packing = pack_shared(borders, row_positions(borders) if grid is None else grid, context_group())
        mine = share(borders, cp, layout.cp_rank)                              # [length / cp]
        local = np.full(length, -1, np.int64)
        local[mine] = np.arange(len(mine))
        here = local[where] >= 0
        where, labels, counted, weight = local[where][here], labels[here], counted[here], weight[here]
    elif on_cpu:
        packing = pack(borders, grid)
    cu_seqlens, longest = torch.from_numpy(borders).to(device), int(np.diff(borders).max())
    packed = PackedRow(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest,
                       max_seqlen_kv=longest, packing=packing,
                       grid=None if on_cpu or grid is None else torch.from_numpy(grid[:, mine]).to(device))
    if cp > 1:
        # Transformer Engine's context parallelism reads these, equal or not
        packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = cu_seqlens
    ids = torch.from_numpy(tokens[mine]).to(device)[None]                      # [1, t / cp]
    targets = Targets(where=torch.from_numpy(where).to(device), labels=torch.from_numpy(labels).to(device),
                      weight=torch.from_numpy(weight).to(device), image=torch.from_numpy(labels >= vocab.first_image).to(device),
                      counted=torch.from_numpy(counted).to(device), z_loss=recipe.optim.z_loss,
                      padding=ids == vocab.pad if recipe.model.num_experts else None, balance_tokens=balance_tokens)
    return MicroBatch(ids, targets, packed, tuple(rows))
