"""Bytes ↔ RGB pictures ↔ tensors in [-1, 1].

What a model sees of a picture file is decided here and nowhere else, so that a picture has the same codes offline and in a
chat: `fitted` is the whole way from a file to the pixels that are encoded. Size is checked from the header, before a pixel is
decoded: a small file can hold a picture that fills the memory.

    colours       grey, 16-bit grey (its high byte, as PIL takes of 16-bit colour), 1-bit, palettes, CMYK (by its profile where
                  it has one); transparency over white; colour profiles of RGB are not applied
    orientation   as EXIF says
    animation     the first frame, or refused
    JPEG          decoded at the smallest of 1/8, 1/4, 1/2, 1 of its size that leaves each side at least twice the one wanted
                  (the DCT scaling of libjpeg); Lanczos does the rest. 3 megapixels cost 9 ms instead of 33 ms

Letters: H W pixels.
"""

import io
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from tokenizer.grid import Size, nearest_bucket

MAX_PIXELS = 64_000_000

@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which pictures are refused from their header."""

    max_pixels: int = MAX_PIXELS
    """Largest picture that is decoded, in pixels."""
    min_side: int = 1
    """Shortest side that is not refused, in pixels."""
    max_aspect: float = 20.0
    """Longest side over the shortest; beyond it, a crop shows next to nothing."""
    animated: Literal["first", "refuse"] = "first"
    """A picture of several frames: its first one, or none."""


ANY = Limits()


class Refused(ValueError):
    """A picture that is not taken; the message starts with a cause that can be counted, and a colon."""


# From a file ------------------------------------------------------------------------------------------------------

def load_image(source: bytes | Path | str, limits: Limits = ANY) -> Image.Image:
    """Decode one picture in full to upright RGB. Errors: Refused."""
    return _load(source, limits, None)


def fitted(source: bytes | Path | str, sizes: int | Sequence[Size], limits: Limits = ANY) -> Image.Image:
    """The picture as it is encoded: upright RGB, resized and cropped to `sizes` (a square side), or to that one of several whose
    aspect is nearest. Errors: Refused."""
    sizes = ((sizes, sizes),) if isinstance(sizes, int) else sizes
    picture = _load(source, limits, sizes)
    return fit(picture, nearest_bucket(*picture.size, sizes))


def header(source: bytes | Path | str, limits: Limits = ANY) -> tuple[str, int, int]:
    """(format as PIL names it, width, height) of a picture of which no pixel is decoded. Errors: Refused, as far as its header tells."""
    name = "picture" if isinstance(source, bytes) else str(source)
    with _refusing(name):
        picture = _open(source, name, limits)
        return picture.format or "", picture.width, picture.height


def _load(source: bytes | Path | str, limits: Limits, sizes: Sequence[Size] | None) -> Image.Image:
    name = "picture" if isinstance(source, bytes) else str(source)
    with _refusing(name):
        picture = _open(source, name, limits)
        if sizes is not None and picture.format in ("JPEG", "MPO"):
            picture.draft(None, _near(picture.size, _turn(picture), sizes))
        picture.load()
        turn = _turn(picture)  # a PNG may tell behind its pixels
        rgb = _rgb(picture, name)
    return rgb if turn is None else rgb.transpose(turn)


def _open(source: bytes | Path | str, name: str, limits: Limits) -> Image.Image:
    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    _check(picture, name, limits)
    return picture


@contextmanager
def _refusing(name: str) -> Generator[None]:
    """Whatever a decoder raises becomes Refused."""
    try:
        yield
    except (FileNotFoundError, MemoryError, Refused):
        raise
    except UnidentifiedImageError as error:  # PIL's words hold an address
        raise Refused(f"does not decode as a picture: {name}: it begins as none that is known") from error
    except Image.DecompressionBombError as error:
        raise Refused(f"too large: {name}: {error}") from error
    except Exception as error:  # decoders meet any bytes, and raise anything
        raise Refused(f"does not decode as a picture: {name}: {error}") from error


def _check(picture: Image.Image, name: str, limits: Limits) -> None:
    width, height = picture.size
    if width * height > limits.max_pixels:
        raise Refused(f"too large: {name} has {width}x{height} = {width * height:,} pixels, over the cap of "
                         f"{limits.max_pixels:,}: raise max_pixels or drop it")
    if min(width, height) < limits.min_side:
        raise Refused(f"too small: {name} has {width}x{height} pixels, one side under min_side = {limits.min_side}: "
                         "lower min_side or drop it")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Refused(f"too narrow: {name} has {width}x{height} pixels, one side over max_aspect = {limits.max_aspect:g} "
                         "times the other: raise max_aspect or drop it")
    if limits.animated == "refuse" and picture.format != "MPO" and getattr(picture, "is_animated", False):
        raise Refused(f"animated: {name} has several frames: set animated to first or drop it")  # an MPO's are previews


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright. EXIF that is damaged says nothing, as in a browser."""
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
"""By EXIF orientation (Exif 2.32, tag 274): 1 is upright, 6 was taken with the camera turned left."""
SIDEWAYS = {TURNS[5], TURNS[6], TURNS[7], TURNS[8]}


def _near(size: tuple[int, int], turn: Image.Transpose | None, sizes: Sequence[Size]) -> tuple[int, int]:
    """(width, height) that a JPEG of `size` need not be decoded beyond, as it lies in the file."""
    step = -1 if turn in SIDEWAYS else 1
    width, height = size[::step]
    width, height = _cover(width, height, nearest_bucket(width, height, sizes))
    width, height = (2 * width, 2 * height)[::step]
    return width, height


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    """Errors: Refused for colours that have no one meaning in 8 bits."""
    mode = picture.mode
    if mode in ("F", "LAB"):
        raise Refused(f"unsupported colours: {name} has mode {mode}")
    if mode.startswith("I"):
        levels = np.asarray(picture)
        if levels.min() < 0 or levels.max() >= 2**16:
            raise Refused(f"unsupported colours: {name} has levels from {levels.min()} to {levels.max()}, beyond 16 bits")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if mode == "CMYK" and (profile := picture.info.get("icc_profile")):
        return _by_profile(picture, profile)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _by_profile(picture: Image.Image, profile: bytes) -> Image.Image:
    try:
        out = ImageCms.profileToProfile(picture, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"),
                                        outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a profile that is damaged, or of other colours than the picture
        return picture.convert("RGB")
    assert out is not None
    return out


# To a size --------------------------------------------------------------------------------------------------------

def fit(picture: Image.Image, size: int | Size) -> Image.Image:
    """Resize until it covers `size`, a square side or (h, w), and crop the middle."""
    height, width = (size, size) if isinstance(size, int) else size
    if picture.size == (width, height):
        return picture
    covering = _cover(*picture.size, (height, width))
    picture = picture.resize(covering, Image.Resampling.LANCZOS)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _cover(width: int, height: int, size: Size) -> tuple[int, int]:
    """(width, height) of a picture made to cover `size` (h, w), aspect kept."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[1], round(width * scale)), max(size[0], round(height * scale))


# As numbers -------------------------------------------------------------------------------------------------------

def to_array(picture: Image.Image) -> np.ndarray:
    """→ uint8 [H, W, 3]."""
    return np.asarray(picture, dtype=np.uint8)


def to_tensor(pictures: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [..., H, W, 3] → float32 [..., 3, H, W] in [-1, 1]; the same bits on every device."""
    levels = torch.from_numpy(np.array(pictures)).movedim(-1, -3)
    if torch.device(device).type == "cpu":
        return levels.float().div_(127.5).sub_(1)
    # a GPU divides by a constant as a product with its reciprocal, which rounds otherwise: look the 256 levels up
    return (torch.arange(256).float().div_(127.5).sub_(1)).to(device)[levels.to(device).int()]


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1] → uint8 [..., H, W, 3]; values outside are clipped."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def to_png(array: np.ndarray) -> bytes:
    """uint8 [H, W, 3] → PNG file."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="png", compress_level=1)
    return out.getvalue()
