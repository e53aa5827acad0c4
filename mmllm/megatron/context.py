"""Context parallelism: which tokens of a packed row belong to which rank, and attention on a CPU that reaches across ranks.

Each document is cut into 2·C pieces of like length, and rank r of C holds pieces r and 2C − 1 − r: causal attention costs a
piece by how far it is from the start, so all ranks get the same work. That is Transformer Engine's division of packed rows
(`thd_get_partitioned_indices`), hence the same on CPU and CUDA. It asks for documents that divide by 2·C: they are
lengthened by padding, which stands at their end, where the causal mask hides it from all that is trained on.

On CUDA keys and values go round in Transformer Engine. On a CPU they are gathered; queries stay where they are.

Letters: t tokens of a micro-batch, of all ranks; C ranks; n documents of a bucket, l its length; g key heads of this rank, r
query heads for each, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from numpy.typing import NDArray
from torch import Tensor

from mmllm.megatron.buckets import STEP, bucket_lengths


def lengthened(borders: NDArray[np.int32], cp: int, length: int, tail: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Document borders [d + 1] → the same with every document a multiple of 2·cp long and, behind them, documents of `tail` tokens of
    padding until there are `length`; and the new place of each token [t]."""
    starts, lengths = borders[:-1].astype(np.int64), np.diff(borders).astype(np.int64)
    longer = -(-lengths // (2 * cp)) * (2 * cp)
    new = np.concatenate([[0], np.cumsum(longer)])
    place = np.repeat(new[:-1] - starts, lengths) + np.arange(borders[-1])
    new = np.concatenate([new, np.arange(new[-1] + tail, length, tail), [length] * int(new[-1] < length)])
    return new.astype(np.int32), place


def share(borders: NDArray[np.int32], cp: int, rank: int) -> NDArray[np.int64]:
    """The tokens [t / cp] of a rank, document after document."""
    lengths = np.diff(borders).astype(np.int64)
    piece, starts = lengths // (2 * cp), borders[:-1].astype(np.int64)
    # place j of a rank's part of a document: in its first piece, or in its second
    j = np.arange(int(lengths.sum()) // cp) - np.repeat(starts // cp, 2 * piece)
    piece, starts = np.repeat(piece, 2 * piece), np.repeat(starts, 2 * piece)
    return starts + in_document(j, piece, cp, rank)


def in_document(j: NDArray[np.int64], piece: NDArray[np.int64], cp: int, rank: int) -> NDArray[np.int64]:
    """Place j of a rank's part of a document, whose pieces are `piece` long → its place in the whole."""
    return np.where(j < piece, rank * piece + j, (2 * cp - 2 - rank) * piece + j)


@dataclass(frozen=True)
class SharedBucket:
    """Documents of like length: this rank's queries, everybody's keys."""

    documents: int
    query: Tensor
    """[n * l / C] the token of this rank in each slot; 0 in padding."""
    key: Tensor
    """[n * l] the gathered token in each slot; 0 in padding."""
    mask: Tensor
    """[n, 1, l / C, l] bool: the query may look at the key."""


@dataclass(frozen=True)
class SharedPacking:
    """The index maps of one micro-batch on one of the ranks that share it."""

    buckets: tuple[SharedBucket, ...]
    slot: Tensor
    """[t / C] each token's query slot, counted through all buckets."""
    position: Tensor
    """[t / C], or [3, t / C] on a grid."""
    group: dist.ProcessGroup


def pack_shared(borders: NDArray[np.int32], position: NDArray[np.int64], group: dist.ProcessGroup) -> SharedPacking:
    """Documents [d + 1], each a multiple of 2·C long → buckets. position [t] or [3, t]: of all ranks' tokens."""
    cp, rank = group.size(), group.rank()
    starts, lengths = borders[:-1].astype(np.int64), np.diff(borders).astype(np.int64)
    step = np.lcm(STEP, 2 * cp)
    rounded = -(-lengths // step) * step
    sizes = bucket_lengths(rounded)
    which = np.searchsorted(sizes, rounded)
    mine = share(borders, cp, rank)
    gathered = np.empty(int(lengths.sum()), np.int64)                          # where each token lies behind one another's
    gathered[np.concatenate([share(borders, cp, r) for r in range(cp)])] = np.arange(len(gathered))
    slot, buckets, first_slot = np.empty(len(mine), np.int64), list[SharedBucket](), 0
    for index, size in enumerate(sizes):
        members = np.flatnonzero(which == index)
        begin, length = starts[members, None], lengths[members, None]          # [n, 1]
        j, place = np.arange(size // cp), np.arange(size)
        held, local = j < length // cp, begin // cp + j                        # [n, l / C]
        at = in_document(j, length // (2 * cp), cp, rank)
        token = np.where(held, local, 0)
        slot[token[held]] = first_slot + np.flatnonzero(held)
        key = np.where(place < length, gathered[np.minimum(begin + place, len(gathered) - 1)], 0)
        # padding looks at the first key: it has to look at something
        mask = place <= np.where(held, at, 0)[:, :, None]                      # [n, l / C, l]
        buckets.append(SharedBucket(len(members), torch.from_numpy(token.reshape(-1)), torch.from_numpy(key.reshape(-1)),
                                    torch.from_numpy(mask[:, None])))
        first_slot += token.size
    return SharedPacking(tuple(buckets), torch.from_numpy(slot), torch.from_numpy(position[..., mine]), group)


def attend_shared(qk: Tensor, v: Tensor, packing: SharedPacking, scale: float) -> Tensor:
    """qk [t / C, g, r + 1, d], v [t / C, g, d] → [t / C, g * r * d]."""
    _, g, each, d = qk.shape
    r = each - 1
    kv = torch.cat([qk[:, :, r], v], 1).flatten(1)                             # [t / C, 2 g d]
    # [t / C, w] -> [t, w]; backward sums what each rank has for it
    kv = tensor_parallel.gather_from_sequence_parallel_region(kv, tensor_parallel_output_grad=True, group=packing.group)
    q = qk[:, :, :r].flatten(1)                                                # [t / C, g r d]
    parts: list[Tensor] = []
    for bucket in packing.buckets:
        n = bucket.documents
        queries = q.index_select(0, bucket.query).view(n, -1, g * r, d).transpose(1, 2)              # [n, g r, l / C, d]
        keys, values = kv.index_select(0, bucket.key).view(n, -1, 2, g, d).permute(2, 0, 3, 1, 4)    # each [n, g, l, d]
        out = F.scaled_dot_product_attention(queries, keys, values, bucket.mask, scale=scale, enable_gqa=r > 1)
        parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))             # [n, g r, l / C, d] -> [n l / C, g r d]
    return torch.cat(parts).index_select(0, packing.slot)
