"""Sizes of pictures: one square, or a set of buckets near each picture's own aspect.

Letters: h w pixels.
"""

from collections.abc import Sequence

Size = tuple[int, int]
"""(height, width) in pixels"""


def buckets(image_size: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """The (h, w) that stand for a square of `image_size` at other aspects: multiples of `step` (patch × largest scale) whose area is
    at most the square's, so that no picture has more codes, and of which neither side can grow. Tall ones first."""
    if image_size % step or max_aspect < 1:
        raise ValueError(f"buckets of {image_size} px in steps of {step} px up to an aspect of {max_aspect}: image_size must be a "
                         "multiple of the step, and max_aspect at least 1")
    units = (image_size // step)**2
    sides = [(h, units // h) for h in range(units, 0, -1) if units // (units // h) == h]  # w fills h, and h fills w
    return tuple((h * step, w * step) for h, w in sides if max(h, w) <= max_aspect * min(h, w))


def nearest_bucket(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Of `sizes` (h, w), that whose aspect is nearest to the picture's, as a ratio; the larger one where two are as near."""
    def key(size: Size) -> tuple[float, int]:
        ours, theirs = width * size[0], height * size[1]
        return max(ours, theirs) / min(ours, theirs), -size[0] * size[1]
    return min(sizes, key=key)
