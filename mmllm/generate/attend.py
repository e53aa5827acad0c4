"""Attention of a few new tokens on a CPU, in one loop.

Between a layer's matrix products a step does twenty small things: norms of queries and keys, rotary positions, writing to the cache,
scores, softmax, a weighted sum. In torch each costs more to call than to do. Here they are one compiled function, which looks at each
row's own length, so nothing is masked, and a row gets the same bits whoever stands beside it.

Letters: b rows, s new tokens, L layers, R rows of the cache, T its columns, H heads, G key-value groups, k head dim.
"""

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from mmllm.generate.cache import Cache

FEW = 1 << 18
"""Multiplications of scores up to which one core does it faster than torch, which uses all of them: 1.6 to 6 times by
`tools/bench/generate.py --attention`, with two."""


def attend(joined: Tensor, qk_norm: Tensor | None, cache: Cache, layer: int, row: int, start: NDArray[np.int64], scale: float,
           eps: float) -> Tensor:
    """Queries, keys and values [b, s, H + 2 G, k] of tokens that come behind the first `start` [b] of the rows from `row` on → what they
    see [b s, H k]. Keys and values go to the cache. qk_norm [H + G, k]. All in float32."""
    b, s, _, k = joined.shape
    heads = joined.shape[2] - 2 * cache.store.shape[3]
    seen = torch.empty(b * s, heads * k)
    weight = np.empty((0, k), np.float32) if qk_norm is None else qk_norm.numpy()
    _attend(joined.numpy(), weight, cache.store.numpy(), cache.turns.numpy(), layer, row, start, np.float32(scale), np.float32(eps),
            seen.numpy().reshape(b, s, heads, k))
    return seen


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
def _attend(joined, weight, store, turns, layer, row, start, scale, eps, seen):  # type: ignore[no-untyped-def]
    b, s, heads, k = seen.shape
    groups = store.shape[3]
    turned, score = np.empty(k, np.float32), np.empty(store.shape[4], np.float32)
    for i in range(b):
        keys, values = store[layer, 0, row + i], store[layer, 1, row + i]  # [G, T, k]
        for j in range(s):
            place = start[i] + j
            for g in range(groups):
                _turn(joined[i, j, heads + g], weight, heads + g, turns[place], eps, keys[g, place])
                values[g, place] = joined[i, j, heads + groups + g]
        for j in range(s):
            place = start[i] + j
            for h in range(heads):
                _turn(joined[i, j, h], weight, h, turns[place], eps, turned)
                _look(turned, keys[h * groups // heads], values[h * groups // heads], place + 1, scale, score, seen[i, j, h])


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
def _turn(x, weight, number, turn, eps, out):  # type: ignore[no-untyped-def]
    """x [k], normed if there are weights, by the rotary angle of its position: low cos − high sin, high cos + low sin."""
    k, half, norm = len(x), len(x) // 2, np.float32(1)
    if len(weight):
        square = np.float32(0)
        for d in range(k):
            square += x[d] * x[d]
        norm /= np.sqrt(square / np.float32(k) + eps)
    for d in range(half):
        low, high = x[d] * norm, x[half + d] * norm
        if len(weight):
            low, high = low * weight[number, d], high * weight[number, half + d]
        out[d] = low * turn[0, d] + high * turn[1, d]
        out[half + d] = high * turn[0, half + d] + low * turn[1, half + d]


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
def _look(query, keys, values, count, scale, score, seen):  # type: ignore[no-untyped-def]
    """query [k] at the first `count` of keys and values [T, k] → seen [k]. score: room for [T]."""
    most = np.float32(-np.inf)
    for t in range(count):
        product = np.float32(0)
        for d in range(len(query)):
            product += query[d] * keys[t, d]
        score[t] = product * scale
        most = max(most, score[t])
    total, seen[:] = np.float32(0), np.float32(0)
    for t in range(count):
        share = np.exp(score[t] - most)
        total += share
        for d in range(len(query)):
            seen[d] += share * values[t, d]
    for d in range(len(query)):
        seen[d] /= total
