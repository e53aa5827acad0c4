"""Rows of conversations → groups of documents → the loss on what the assistant says.

A *row* packs conversations; here each stands by itself again, padded on the right in a batch of others of about its
length, so stock causal attention of any kind keeps them apart and needs no mask. Only tokens trained on go through the
output layer: with a visual vocabulary it is half of the work.

Letters: n documents of a group, l its length, c tokens trained on in it, d hidden, v ids.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.loader import Row

GROUP_COST = 256
"""What one more group costs, in padded tokens of a small model on a CPU: its calls take as long."""


class Group(NamedTuple):
    """Documents of about one length, padded on the right."""

    tokens: Tensor  # [n, l] int64
    labels: Tensor  # [n, l] int64
    weight: Tensor  # [n, l] float32


def on(device: torch.device, group: Group) -> Group:
    """The group on a device."""
    return Group(*(x.to(device) for x in group))


def document_groups(rows: Sequence[Row]) -> list[Group]:
    """Documents of rows, each up to its last trained token, in groups of like length that together pad least."""
    spans = [(row, int(a), int(a + np.flatnonzero(row.loss_weight[a:b])[-1] + 1))
             for row in rows for a, b in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True)
             if row.loss_weight[a:b].any()]
    if not spans:
        return [nothing()]
    spans.sort(key=lambda span: span[2] - span[1])
    groups: list[Group] = []
    for first, last in _least_padding([b - a for _, a, b in spans]):
        members = spans[first:last]
        l = members[-1][2] - members[-1][1]  # noqa: E741
        out = [np.zeros((len(members), l), dtype) for dtype in (np.int64, np.int64, np.float32)]
        for i, (row, a, b) in enumerate(members):
            for array, source in zip(out, (row.tokens, row.labels, row.loss_weight), strict=True):
                array[i, :b - a] = source[a:b]
        groups.append(Group(*map(torch.from_numpy, out)))
    return groups


def nothing() -> Group:
    """One token of no weight, for a rank that has none: it must take part in every forward and backward."""
    return Group(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))


def _least_padding(lengths: list[int]) -> list[tuple[int, int]]:
    """Ascending lengths → ranges [first, last) with the least padded tokens, each range costing GROUP_COST besides."""
    best, cut = [0.0], [0]
    for last in range(1, len(lengths) + 1):
        costs = [best[first] + (last - first) * lengths[last - 1] + GROUP_COST for first in range(last)]
        cut.append(min(range(last), key=costs.__getitem__))
        best.append(costs[cut[-1]])
    ranges: list[tuple[int, int]] = []
    last = len(lengths)
    while last:
        ranges.append((cut[last], last))
        last = cut[last]
    return ranges[::-1]


class AssistantLoss(nn.Module):
    """A causal language model of transformers whose forward gives the loss of groups."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, groups: Sequence[Group], first_image: int) -> tuple[Tensor, Tensor]:
        """→ weighted loss sum (scalar), and detached [text loss, text weight, image loss, image weight]."""
        losses, labels, weights = list[Tensor](), list[Tensor](), list[Tensor]()
        for group in groups:
            hidden = self.causal.model(input_ids=group.tokens, use_cache=False).last_hidden_state  # [n, l, d]
            asked = group.weight > 0 if bool(group.weight.any()) else torch.ones_like(group.weight, dtype=torch.bool)
            logits = self.causal.lm_head(hidden[asked])  # [c, v]
            losses.append(F.cross_entropy(logits.float(), group.labels[asked], reduction="none"))
            labels.append(group.labels[asked])
            weights.append(group.weight[asked])
        loss, weight, image = torch.cat(losses), torch.cat(weights), torch.cat(labels) >= first_image
        weighted = loss * weight
        parts = [x[mask].sum() for mask in (~image, image) for x in (weighted.detach(), weight)]
        return weighted.sum(), torch.stack(parts)
