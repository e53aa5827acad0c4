"""Which pictures are refused: by file format, size and shape, from the header, and where they do not decode."""

from dataclasses import dataclass
from typing import Literal

from data.images import MAX_PIXELS, Limits, Refused, header, load_image

Format = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"]


@dataclass(frozen=True, kw_only=True)
class PictureRules:
    """Pictures that are refused."""

    min_side: int = 1
    """Shortest side that is taken, in pixels."""
    max_side: int | None = None
    """Longest side that is taken, in pixels; None: any."""
    max_pixels: int = MAX_PIXELS
    """Most pixels that are taken."""
    max_aspect: float = 20.0
    """Longest side over the shortest."""
    formats: tuple[Format, ...] = ("jpeg", "png", "webp")
    """What the bytes are, whatever the file is called."""
    animated: Literal["first", "refuse"] = "first"
    """A picture of several frames: taken for its first one, or not."""
    decode: bool = True
    """Whether each picture is decoded, some 10 ms a megapixel, or judged by its header alone."""


def check_picture(file: bytes, rules: PictureRules) -> None:
    """Errors: Refused "cause: …"."""
    limits = Limits(max_pixels=rules.max_pixels, min_side=rules.min_side, max_aspect=rules.max_aspect, animated=rules.animated)
    name, width, height = header(file, limits)
    found = name.lower().replace("mpo", "jpeg")  # a JPEG with previews behind it
    if found not in rules.formats:
        raise Refused(f"file format: it is {found}, and none of formats = {', '.join(rules.formats)}")
    if rules.max_side is not None and max(width, height) > rules.max_side:
        raise Refused(f"too large: it has {width}x{height} pixels, one side over max_side = {rules.max_side}")
    if rules.decode:
        load_image(file, limits)
