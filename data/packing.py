"""Whole documents into rows of s tokens, none split.

A row takes documents in their order until the next does not fit; then, of the documents that wait in a window, the longest that
does, until none does. So rows hold the mixture as it comes (sorting a window by length would pack as well, and put all the long
documents into one step), and the result depends only on the lengths and their order.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_len: int, window: int = 256) -> list[list[int]]:
    """Numbers of the documents in each row, in the order of the rows.

    lengths: tokens of document 0, 1, …; row_len: s; window: documents looked at to fill a gap.
    Errors: ValueError for a document longer than a row.
    """
    rows: list[list[int]] = []
    waiting: list[tuple[int, int]] = []  # (length, number) of the window's documents, sorted
    entered, oldest, placed = 0, 0, bytearray(len(lengths))
    while oldest < len(lengths):
        row, space = list[int](), row_len
        while True:
            while entered < len(lengths) and len(waiting) < window:
                if not 0 < lengths[entered] <= row_len:
                    raise ValueError(f"document {entered} has {lengths[entered]:,} tokens but a row holds {row_len:,}: "
                                     "raise data.row_len or drop the document")
                insort(waiting, (lengths[entered], entered))
                entered += 1
            if oldest < len(lengths) and lengths[oldest] <= space:
                at = bisect_left(waiting, (lengths[oldest], oldest))
            else:
                at = bisect_right(waiting, (space, len(lengths))) - 1
            if at < 0 or not waiting:
                break
            length, number = waiting.pop(at)
            row.append(number)
            space -= length
            placed[number] = 1
            while oldest < len(lengths) and placed[oldest]:
                oldest += 1
        rows.append(row)
    return rows
