"""Whole documents into rows of s tokens, none split.

A row takes documents in their order until the next does not fit; then, of the documents that wait in a window, the longest that
does, until none does. Where a gap is left of more than a 256th of the row, its last two documents make place for the one or two of the
window that fill it best. So rows hold the mixture as it comes (sorting a window by length would pack as well, and put all the long
documents into one step), and the result depends only on the lengths and their order. Best fit: Johnson et al. 1974, SIAM J. Comput.
3(4); over a window, so that memory and what a row can hold of the future are bounded.

Compiled by numba: 5 to 90 ns a document (the more pairs are tried, the longer), where Python took 1.5 µs for less.
"""

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray


def pack(lengths: ArrayLike, row_len: int, window: int = 256) -> list[list[int]]:
    """Numbers of the documents in each row, in the order of the rows.

    lengths: tokens of document 0, 1, …; row_len: s; window: documents looked at to fill a gap.
    Errors: ValueError for a document longer than a row.
    """
    order, first = placed(np.asarray(lengths, np.int64), row_len, window)
    return [row.tolist() for row in np.split(order, first[1:-1])] if len(order) else []


def placed(lengths: NDArray[np.int64], row_len: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `pack`: documents [n] row after row, and where each row begins [rows + 1]."""
    if window < 1:
        raise ValueError(f"a packing window of {window} documents sees none: data.window is at least 1")
    wrong = np.flatnonzero((lengths < 1) | (lengths > row_len))
    if len(wrong):
        raise ValueError(f"document {wrong[0]} has {lengths[wrong[0]]:,} tokens but a row holds {row_len:,}: "
                         "raise data.row_len, or say with data.long_documents what becomes of it")
    return _place(lengths, row_len, window)


@njit(cache=True)
def _place(lengths, row_len, window):  # type: ignore[no-untyped-def]
    count, tolerance = len(lengths), row_len // 256
    order, first = np.empty(count, np.int64), np.empty(count + 1, np.int64)
    head = np.full(row_len + 1, -1, np.int64)   # of each length, the documents that wait, oldest first: a linked list
    tail = np.full(row_len + 1, -1, np.int64)
    behind = np.full(count, -1, np.int64)
    done = np.zeros(count, np.bool_)
    entered, oldest, waiting, rows, out = 0, 0, 0, 0, 0
    while out < count:
        first[rows] = begin = out
        space, exchanged = row_len, False
        while True:
            while entered < count and waiting < window:
                length = lengths[entered]
                if head[length] < 0:
                    head[length] = entered
                else:
                    behind[tail[length]] = entered
                tail[length] = entered
                entered += 1
                waiting += 1
            while oldest < count and done[oldest]:
                oldest += 1
            if oldest < count and lengths[oldest] <= space:
                chosen, other = lengths[oldest], 0  # its head is the oldest of all
            else:
                chosen, other = _longest(head, space), 0
            if chosen == 0:
                if space <= tolerance or exchanged or out - begin < 3 or waiting == 0:
                    break
                exchanged = True
                for _ in range(2):
                    out -= 1
                    number = order[out]
                    length = lengths[number]
                    behind[number] = head[length]  # it was the oldest of its length
                    if head[length] < 0:
                        tail[length] = number
                    head[length], done[number] = number, False
                    oldest = min(oldest, number)
                    waiting += 1
                    space += length
                chosen, other = _best_pair(head, behind, space)
            for length in (chosen, other):
                if length > 0:
                    number = head[length]
                    head[length] = behind[number]
                    done[number] = True
                    order[out] = number
                    out += 1
                    waiting -= 1
                    space -= length
        rows += 1
    first[rows] = count
    return order, first[:rows + 1]


@njit(cache=True)
def _longest(head, space):  # type: ignore[no-untyped-def]
    """Length of the longest document that fits; 0 where none does."""
    while space > 0 and head[space] < 0:
        space -= 1
    return space


@njit(cache=True)
def _best_pair(head, behind, space):  # type: ignore[no-untyped-def]
    """Lengths of the one or two documents that together fill most of `space`."""
    chosen, other = _longest(head, space), 0
    short, long = 1, chosen
    while short <= long and chosen + other < space:
        if head[short] < 0 or (short == long and behind[head[short]] < 0):
            short += 1
        elif short + long > space:
            long = _longest(head, long - 1)
        else:
            if short + long > chosen + other:
                chosen, other = long, short
            short += 1
    return chosen, other
