"""Whole documents into rows of s tokens, none split.

Windowed best fit: the documents of a window are placed longest first, each into the open row that it fills best, so the short
ones close the gaps. A row with less room than the window's shortest document closes; the others stay open for the next. One
pass, bounded memory, and the result depends only on the lengths and their order.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row_len: int, window: int = 256) -> list[list[int]]:
    """Numbers of the documents in each row, rows in the order in which they close.

    lengths: tokens of document 0, 1, …; row_len: s; window: documents placed together, and the most rows that stay open.
    Errors: ValueError for a document longer than a row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, number of the open row), sorted
    members: dict[int, list[int]] = {}
    opened = 0
    for first in range(0, len(lengths), window):
        numbers = sorted(range(first, min(first + window, len(lengths))), key=lambda n: -lengths[n])
        for number in numbers:
            length = lengths[number]
            if not 0 < length <= row_len:
                raise ValueError(f"document {number} has {length:,} tokens but a row holds {row_len:,}: "
                                 "raise data.row_len or drop the document")
            at = bisect_left(spaces, (length, -1))
            if at == len(spaces):
                space, row = row_len, opened
                members[row] = []
                opened += 1
            else:
                space, row = spaces.pop(at)
            members[row].append(number)
            insort(spaces, (space - length, row))
        full = max(bisect_left(spaces, (lengths[numbers[-1]], -1)), len(spaces) - window)
        rows += [members.pop(row) for row in sorted(row for _, row in spaces[:full])]
        del spaces[:full]
    return rows + [members[row] for row in sorted(members)]
