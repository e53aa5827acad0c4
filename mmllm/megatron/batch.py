"""From packed rows to what one forward pass takes.

Row n is the same whoever asks, so nothing is broadcast: every rank of a tensor- or pipeline-parallel group reads the
rows of its data-parallel rank itself. Rank r of D, step t, G rows a step: rows t·G + r·G/D … t·G + (r+1)·G/D − 1.

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
from mmllm.megatron.loss import Targets
from mmllm.megatron.parallel import Layout, data_group


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
    """[1, t]"""
    targets: Targets
    packed: PackedRow
    rows: tuple[Row, ...]
    """Where it came from, for a report."""


def row_numbers(step: int, global_batch: int, dp_rank: int, dp: int) -> range:
    """The rows of one rank in one step."""
    each = global_batch // dp
    first = step * global_batch + dp_rank * each
    return range(first, first + each)


def join_borders(rows: Sequence[Row], pad: int, device: torch.device) -> NDArray[np.int32]:
    """Document borders of rows laid end to end, [d + 1]. On a CPU a tail of padding becomes many short documents:
    attending over it as one costs as much as the rest of the row, and its outputs are never used."""
    borders, start = [np.zeros(1, np.int64)], 0
    for row in rows:
        inside = row.cu_seqlens[1:].astype(np.int64)
        tail = int(row.cu_seqlens[-2])
        if device.type == "cpu" and row.tokens[tail] == pad:
            inside = np.concatenate([np.arange(tail, len(row.tokens), STEP), inside[-1:]])
            inside = np.concatenate([row.cu_seqlens[1:-2].astype(np.int64), inside])
        borders.append(inside + start)
        start += len(row.tokens)
    joined = np.concatenate(borders)
    return joined[np.r_[True, np.diff(joined) > 0]].astype(np.int32)


def micro_batches(rows: Sequence[Row], vocab: Vocab, recipe: Pretrain, layout: Layout) -> list[MicroBatch]:
    """Everything this rank computes in one step, given its rows; the loss weights already divided by the whole global batch's
    weight."""
    first_image = vocab.first_image
    modality = [np.where(row.labels >= first_image, recipe.image_loss_weight, recipe.text_loss_weight) for row in rows]
    weights = [row.loss_weight * each for row, each in zip(rows, modality, strict=True)]
    mine = sum(float(weight.sum(dtype=np.float64)) for weight in weights)
    total = torch.tensor([mine], dtype=torch.float64, device=layout.device)
    if layout.dp > 1:
        dist.all_reduce(total, group=data_group())
    whole = max(float(total), 1e-9)
    parts = [slice(i, i + recipe.micro_batch) for i in range(0, len(rows), recipe.micro_batch)]
    return [micro_batch(rows[part], weights[part], whole, vocab, recipe, layout) for part in parts]


def micro_batch(rows: Sequence[Row], weights: Sequence[NDArray[np.floating]], whole: float, vocab: Vocab,
                recipe: Pretrain, layout: Layout) -> MicroBatch:
    """Rows laid end to end as one forward pass."""
    device = layout.device
    weight = np.concatenate(weights)
    where = np.flatnonzero(weight)                                             # [m]
    labels = np.concatenate([row.labels for row in rows])[where]
    counted = np.concatenate([row.loss_weight for row in rows])[where].astype(np.float32)
    borders = join_borders(rows, vocab.pad, device)
    cu_seqlens = torch.from_numpy(borders).to(device)
    longest = int(np.diff(borders).max())
    packed = PackedRow(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest,
                       max_seqlen_kv=longest, packing=pack(borders) if device.type == "cpu" else None)
    targets = Targets(where=torch.from_numpy(where).to(device), labels=torch.from_numpy(labels).to(device),
                      weight=torch.from_numpy((weight[where] / whole).astype(np.float32)).to(device),
                      image=torch.from_numpy(labels >= vocab.first_image).to(device),
                      counted=torch.from_numpy(counted).to(device), z_loss=recipe.optim.z_loss)
    tokens = torch.from_numpy(np.concatenate([row.tokens for row in rows])).to(device)[None]       # [1, t]
    return MicroBatch(tokens, targets, packed, tuple(rows))
