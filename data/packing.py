"""Whole documents into rows of s tokens, none split.

Windowed best fit: a document goes to the open row that it fills best; a row closes when it is full or when more than
`window` rows are open. One pass, bounded memory, and the result depends only on the lengths and their order.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable


def pack(lengths: Iterable[int], row_len: int, window: int = 64) -> list[list[int]]:
    """Numbers of the documents in each row, rows in the order in which they close.

    lengths: tokens of document 0, 1, …; row_len: s; window: rows kept open at once.
    Errors: ValueError for a document longer than a row.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, number of the open row), sorted
    members: dict[int, list[int]] = {}
    opened = 0
    for number, length in enumerate(lengths):
        if not 0 < length <= row_len:
            raise ValueError(f"document {number} has {length:,} tokens but a row holds {row_len:,}: "
                             "raise data.row_len or drop the document")
        at = bisect_left(spaces, (length, -1))
        if at == len(spaces):
            if len(spaces) >= window:  # the fullest open row is the one with least use
                rows.append(members.pop(spaces.pop(0)[1]))
            space, row = row_len, opened
            members[row] = []
            opened += 1
        else:
            space, row = spaces.pop(at)
        members[row].append(number)
        if space == length:
            rows.append(members.pop(row))
        else:
            insort(spaces, (space - length, row))
    return rows + [members[row] for row in sorted(members)]
