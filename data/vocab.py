"""The id space that text, control tokens and image codes share.

A *code* indexes one codebook, in [0, K). A *token id* indexes the language model's embedding. This module is the
only place where one becomes the other:

    text [0, T) | control | image codes, book by book: T + C + m * K + code | padding (in the model alone)

Letters: T text pieces, C control tokens, K codes a book, M books, h w code grid, n ids.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PLAIN_CONTROL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<user>", "<assistant>", "<system>")


@dataclass(frozen=True)
class Vocab:
    """Sizes of the parts; every id follows from them."""

    text_size: int
    """T: pieces of the text tokenizer."""
    codebook_size: int
    """K: entries of each image codebook."""
    num_books: int = 1
    """M: codes an image position holds."""
    grids: tuple[tuple[int, int], ...] = ((4, 4),)
    """Code grids (h, w) that a picture may have; each has a control token that announces it."""

    def __post_init__(self) -> None:
        if min(self.text_size, self.codebook_size, self.num_books) < 1 or not self.grids:
            raise ValueError(f"a vocabulary needs text, codes, books and a grid; got {self}")

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return (*PLAIN_CONTROL, *(f"<grid_{h}x{w}>" for h, w in self.grids))

    @property
    def pad(self) -> int:
        return self.text_size

    @property
    def bos(self) -> int:
        return self.text_size + 1

    @property
    def eos(self) -> int:
        return self.text_size + 2

    @property
    def boi(self) -> int:
        return self.text_size + 3

    @property
    def eoi(self) -> int:
        return self.text_size + 4

    @property
    def user(self) -> int:
        return self.text_size + 5

    @property
    def assistant(self) -> int:
        return self.text_size + 6

    @property
    def system(self) -> int:
        return self.text_size + 7

    def grid(self, h: int, w: int) -> int:
        """Id of the control token that announces an h × w picture."""
        if (h, w) not in self.grids:
            raise ValueError(f"a code grid of {h}x{w} has no control token: Vocab.grids has {self.grids}")
        return self.first_grid + self.grids.index((h, w))

    @property
    def first_grid(self) -> int:
        """Id that announces the first of `grids`; the others follow."""
        return self.text_size + len(PLAIN_CONTROL)

    @property
    def first_image(self) -> int:
        """First id of an image code; every id from here on is one."""
        return self.text_size + len(self.control_tokens)

    @property
    def size(self) -> int:
        """Ids that mean something; the model's rows are padded beyond."""
        return self.first_image + self.num_books * self.codebook_size

    def image_ids(self, codes: ArrayLike) -> NDArray[np.int64]:
        """Codes [..., M, h, w] → ids [..., h * w * M]: position after position in raster order, the books of one together."""
        codes = np.asarray(codes, dtype=np.int64)
        if codes.ndim < 3 or codes.shape[-3] != self.num_books:
            raise ValueError(f"codes have shape {codes.shape}; this vocabulary wants [{self.num_books}, h, w]")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise ValueError(f"codes span {codes.min()}..{codes.max()}; a book has {self.codebook_size} entries")
        first = self.first_image + np.arange(self.num_books) * self.codebook_size
        *many, books, h, w = codes.shape
        ids = codes.reshape(*many, books, h * w) + first[:, None]
        return ids.swapaxes(-1, -2).reshape(*many, -1)  # [..., M, h w] -> [..., h w M]

    def codes(self, ids: ArrayLike, h: int, w: int) -> NDArray[np.int32]:
        """Ids [h * w * M] → codes [M, h, w]; refuses any id that is not a code of its book."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.shape != (h * w * self.num_books,):
            raise ValueError(f"a {h}x{w} picture with {self.num_books} books has {h * w * self.num_books} ids, "
                             f"got {ids.shape}")
        codes = ids.reshape(-1, self.num_books) - self.first_image - np.arange(self.num_books) * self.codebook_size
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise ValueError("ids hold one that is no code of its book")
        return codes.T.reshape(self.num_books, h, w).astype(np.int32)

    def token_name(self, token_id: int) -> str:
        """Name of a control token or image code, as the exported tokenizer spells it."""
        if not self.text_size <= token_id < self.size:
            raise ValueError(f"token id {token_id} is not a control token or image code "
                             f"([{self.text_size}, {self.size}))")
        if token_id < self.first_image:
            return self.control_tokens[token_id - self.text_size]
        book, code = divmod(token_id - self.first_image, self.codebook_size)
        return f"<image_{book}_{code:05d}>"

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Vocab":
        return cls.of(json.loads(Path(path).read_text()))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Vocab":
        """From plain values, as saved or as in a manifest."""
        return cls(text_size=fields["text_size"], codebook_size=fields["codebook_size"], num_books=fields["num_books"],
                   grids=tuple((h, w) for h, w in fields["grids"]))
