"""Bytes ↔ RGB pictures ↔ tensors in [-1, 1].

Size is checked from the header, before a pixel is decoded: a small file can hold a picture that fills the memory.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000


def load_image(source: bytes | Path | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one picture to RGB; transparency is laid over white. Errors: ValueError that says what is wrong."""
    name = "picture" if isinstance(source, bytes) else str(source)
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        width, height = picture.size
        if width * height > max_pixels:
            raise ValueError(f"{name} has {width}x{height} = {width * height:,} pixels, over the cap of "
                             f"{max_pixels:,}: raise max_pixels or drop it")
        picture.load()
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} does not decode as a picture: {error}") from error
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def fit(picture: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` and crop the middle: → size × size."""
    width, height = picture.size
    if (width, height) == (size, size):
        return picture
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def to_array(picture: Image.Image) -> np.ndarray:
    """→ uint8 [H, W, 3]."""
    return np.asarray(picture, dtype=np.uint8)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] → float32 [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).movedim(-1, -3).float().div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1] → uint8 [..., H, W, 3]; values outside are clipped."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def to_png(array: np.ndarray) -> bytes:
    """uint8 [H, W, 3] → PNG file."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="png", compress_level=1)
    return out.getvalue()
