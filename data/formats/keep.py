"""What of a picture file is kept: its bytes as they are, once they have shown that they are a picture, or a smaller picture."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from data.images import ANY, Limits, fitted, header, load_image, to_array, to_png
from data.shards import extension_of

PROBE = 8
"""pixels; a JPEG is decoded at an eighth of its size to see that it is whole, which reads all of it in a quarter of the time."""
QUALITY = 95
"""Of a JPEG that was made smaller."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What is done to a picture."""

    size: int | None = None
    """Side of a square that every picture is fitted to, in pixels, as PNG; None keeps the file."""
    max_side: int | None = None
    """Longest side, in pixels; a larger picture is made smaller: a JPEG stays one, others become PNG."""
    check: Literal["full", "header"] = "full"
    """Decode every picture in full before its file is kept, or believe its header."""
    limits: Limits = ANY
    """Which pictures are refused from their header."""

    def __post_init__(self) -> None:
        if self.size is not None and self.max_side is not None:
            raise ValueError(f"size is {self.size} and max_side {self.max_side}: pictures are fitted to a square, or kept within a side")
        for name in ("size", "max_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value} pixels: it is at least 1")


def kept(file: bytes, keep: Keep) -> bytes:
    """The file that goes into a shard: png, jpg or webp. Errors: Refused."""
    if keep.size is not None:
        return to_png(to_array(fitted(file, keep.size, keep.limits)))
    extension = extension_of(file)
    _, width, height = header(file, keep.limits)
    if keep.max_side is not None and max(width, height) > keep.max_side:
        scale = keep.max_side / max(width, height)
        h, w = max(1, round(height * scale)), max(1, round(width * scale))
        return _file(fitted(file, ((h, w), (w, h)), keep.limits), extension == "jpg")  # as it lies, or as EXIF turns it
    if extension is None:
        return to_png(to_array(load_image(file, keep.limits)))
    if keep.check == "full":
        fitted(file, PROBE, keep.limits)
    return file


def _file(picture: Image.Image, photograph: bool) -> bytes:
    if not photograph:
        return to_png(to_array(picture))
    out = io.BytesIO()
    picture.save(out, format="jpeg", quality=QUALITY, subsampling=0)
    return out.getvalue()
