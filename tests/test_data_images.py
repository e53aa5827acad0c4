"""A picture file of any kind becomes the same upright RGB pixels everywhere, or is refused with a cause; sizes follow its aspect."""

import io
import itertools
import random
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import Limits, Refused, fit, fitted, load_image, to_array, to_png, to_tensor, to_uint8
from data.skipped import Skipped
from tokenizer.grid import buckets, nearest_bucket

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it tells what is damaged

RNG = np.random.default_rng(0)


def file(picture: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, format=kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def noise(width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """A photograph's worth of low frequencies."""
    y, x = np.mgrid[:height, :width] / max(width, height) * 7
    return Image.fromarray((127 + 120 * np.stack([np.sin(x + c) * np.cos(y - c) for c in range(3)], -1)).astype(np.uint8))


# Colours ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("mode", "colour", "kind", "seen"), [
    ("RGB", (1, 2, 3), "png", (1, 2, 3)), ("L", 77, "png", (77,) * 3), ("1", 1, "png", (255,) * 3), ("1", 0, "tiff", (0,) * 3),
    ("RGBA", (255, 0, 0, 0), "png", (255,) * 3), ("RGBA", (0, 0, 0, 255), "webp", (0,) * 3), ("LA", (0, 0), "png", (255,) * 3),
    ("LA", (10, 255), "png", (10,) * 3), ("CMYK", (0, 0, 0, 255), "tiff", (0,) * 3), ("CMYK", (0, 0, 0, 0), "jpeg", (255,) * 3),
    ("I;16", 256 * 200 + 255, "png", (200,) * 3), ("I;16", 65535, "tiff", (255,) * 3), ("I;16B", 256 * 9, "tiff", (9,) * 3),
    ("I", 256 * 30, "tiff", (30,) * 3), ("L", 200, "gif", (200,) * 3),
])
def test_every_kind_of_colour_becomes_rgb(mode: str, colour: int, kind: str, seen: tuple[int, ...]) -> None:
    picture = load_image(file(Image.new(mode, (6, 5), colour), kind))
    assert (picture.mode, picture.size) == ("RGB", (6, 5)) and (to_array(picture) == seen).all()


def test_a_palette_and_its_transparent_colour_are_looked_up() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    assert to_array(load_image(file(picture))).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    for kind in ("png", "gif"):
        assert to_array(load_image(file(picture, kind, transparency=1))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey = Image.new("L", (1, 1), 3)
    assert to_array(load_image(file(grey, transparency=3))).tolist() == [[[255, 255, 255]]]


def cmyk_profile() -> bytes:
    """An ICC profile (ICC.1:2010, sections 7 and 10.8) of printer inks in which black is black and cyan alone is a middle grey."""
    inks = b"".join(bytes([0 if k else 128 if c else 255, 128, 128]) for c, _, _, k in itertools.product((0, 1), repeat=4))  # Lab
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += ramp * 4 + inks + ramp * 3
    head = struct.pack(">I4sI4s4s4s", 144 + len(table), b"none", 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D) + bytes(48)
    return head + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


def test_inks_are_shown_by_their_profile_and_plainly_without_a_good_one() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert to_array(load_image(file(cyan, "tiff", icc_profile=cmyk_profile())))[0, 0].tolist() == [119, 119, 119]  # L* 50
    for profile in (None, b"damaged", cmyk_profile()[:300]):
        assert to_array(load_image(file(cyan, "tiff", icc_profile=profile)))[0, 0].tolist() == [0, 255, 255]


# What EXIF and frames say -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_stands_upright_whatever_its_orientation(orientation: int, kind: str) -> None:
    upright = np.zeros((24, 48, 3), np.uint8)
    upright[:8, :16] = 255  # white in the top left corner
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what a camera held so would store
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    data = file(stored, kind, exif=exif)
    for picture in (load_image(data), fitted(data, ((24, 48), (48, 24)))):
        seen = to_array(picture)
        assert seen.shape == (24, 48, 3) and seen[:6, :14].min() > 200 and seen[10:].max() < 60 and seen[:, 20:].max() < 60


def test_damaged_exif_turns_nothing() -> None:
    picture = smooth(16, 8)
    assert load_image(file(picture, "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (16, 8)
    assert load_image(file(picture, "jpeg", exif=b"Exif\0\0junk")).size == (16, 8)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_an_animation_is_its_first_frame_or_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    moving = file(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    assert to_array(load_image(moving))[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(Refused, match=r"^animated: picture has several frames"):
        load_image(moving, Limits(animated="refuse"))
    assert load_image(file(frames[0], kind), Limits(animated="refuse")).size == (8, 8)


# What is refused ----------------------------------------------------------------------------------------------------

def test_limits_are_checked_before_a_pixel_is_decoded() -> None:
    cut = file(noise(8, 8))[:60]  # a whole header and no pixels
    with pytest.raises(Refused, match=r"^too large: picture has 8x8 = 64 pixels, over the cap of 63: raise max_pixels"):
        load_image(cut, Limits(max_pixels=63))
    with pytest.raises(Refused, match=r"^too small: picture has 8x8 pixels, one side under min_side = 9: lower min_side"):
        load_image(cut, Limits(min_side=9))
    with pytest.raises(Refused, match=r"^too narrow: picture has 1x21 pixels, .* max_aspect = 20 times"):
        load_image(file(noise(1, 21)))
    with pytest.raises(Refused, match=r"^does not decode as a picture: "):
        load_image(cut)
    assert load_image(file(noise(1, 20))).size == (1, 20)


def test_a_small_file_of_a_huge_picture_is_refused() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(4)
    with pytest.raises(Refused, match=r"^(too large|does not decode)"):
        load_image(bomb)


def test_levels_without_a_meaning_in_8_bits_are_refused() -> None:
    for picture in (Image.new("F", (3, 3), 0.5), Image.new("I", (3, 3), -1), Image.new("I", (3, 3), 2**16)):
        with pytest.raises(Refused, match=r"^unsupported colours: "):
            load_image(file(picture, "tiff"))


def test_bytes_that_are_no_picture_are_refused_and_named(tmp_path: Path) -> None:
    for junk in (b"", b"nonsense", file(noise())[:60], file(noise(64, 64), "jpeg")[:300]):
        with pytest.raises(Refused, match=r"^does not decode as a picture: picture: "):
            load_image(junk)
    (tmp_path / "x.png").write_bytes(b"junk")
    with pytest.raises(Refused, match=r"^does not decode as a picture: .*x\.png"):
        load_image(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
def test_damaged_files_are_decoded_or_refused_and_nothing_else(kind: str) -> None:
    rng, whole = random.Random(kind), file(smooth(24, 16), kind)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert load_image(bytes(data[:rng.choice((len(data), rng.randrange(len(data))))]), Limits(max_pixels=10**6)).mode == "RGB"
        except Refused as error:
            assert ": " in str(error)


def test_refusals_count_by_cause() -> None:
    skipped = Skipped()
    for name, limits, data in (("a", Limits(), b"junk"), ("b", Limits(min_side=20), file(noise())), ("c", Limits(), b"")):
        with pytest.raises(Refused) as refusal:
            load_image(data, limits)
        skipped.refuse(refusal.value, name)
    assert dict(skipped.causes) == {"does not decode as a picture": 2, "too small": 1}
    assert skipped.first["too small"].startswith("b: picture has 8x8")
    assert Skipped.of_json(skipped.to_json()) == skipped
    assert Skipped.joined([skipped, skipped]).causes.total() == 6


# Sizes --------------------------------------------------------------------------------------------------------------

def test_fitting_crops_the_middle() -> None:
    wide = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3, [0] * 3]], np.uint8).repeat(10, 1), 10, 0))
    assert fit(wide, 10).size == (10, 10) and to_array(fit(wide, 10))[5, 5].min() > 200


@pytest.mark.parametrize(("width", "height"), [(40, 30), (33, 65), (7, 100), (64, 64), (100, 31)])
def test_fitting_a_square_is_resizing_the_short_side_and_cropping(width: int, height: int) -> None:
    picture, size = noise(width, height), 32
    scale = size / min(width, height)
    whole = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.LANCZOS)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    for way in (fit(picture, size), fit(picture, (size, size)), fitted(file(picture), size)):
        assert way.tobytes() == whole.crop((left, top, left + size, top + size)).tobytes()


@pytest.mark.parametrize(("image_size", "step", "max_aspect"), [(256, 16, 2), (256, 64, 4), (64, 8, 3), (384, 48, 2.5), (32, 8, 1)])
def test_buckets_are_the_largest_shapes_within_the_squares_area(image_size: int, step: int, max_aspect: float) -> None:
    found = buckets(image_size, step, max_aspect)
    area = range(step, image_size**2 // step + 1, step)
    fits = {(h, w) for h in area for w in area if h * w <= image_size**2} if image_size < 300 else set(found)
    slow = {(h, w) for h, w in fits if max(h, w) <= max_aspect * min(h, w) and image_size**2 < h * (w + step)
            and image_size**2 < (h + step) * w}
    assert set(found) == slow and (image_size, image_size) in found and len(set(found)) == len(found)
    assert {(w, h) for h, w in found} == set(found) and list(found) == sorted(found, reverse=True)
    assert all(h * w >= 0.6 * image_size**2 for h, w in found)


def test_a_step_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the step"):
        buckets(100, 16, 2)


def test_the_nearest_bucket_is_nearest_in_ratio_whatever_the_order() -> None:
    rng, sizes = random.Random(0), buckets(256, 16, 4)
    for _ in range(300):
        width, height = rng.randint(1, 3000), rng.randint(1, 3000)
        off = {(h, w): max(r := Fraction(width * h, height * w), 1 / r) for h, w in sizes}
        assert off[nearest_bucket(width, height, sizes)] == min(off.values())
        assert nearest_bucket(width, height, sizes) == nearest_bucket(width, height, rng.sample(sizes, len(sizes)))
    assert nearest_bucket(640, 640, sizes) == (256, 256)


def test_a_picture_goes_to_the_bucket_of_its_aspect() -> None:
    sizes = buckets(64, 8, 4)
    for width, height in ((640, 480), (480, 640), (100, 399), (64, 64), (20, 21)):
        picture = fitted(file(smooth(width, height)), sizes)
        assert picture.size[::-1] == nearest_bucket(width, height, sizes)


# JPEG near the wanted size --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("width", "height"), [(1024, 768), (513, 900), (300, 200), (129, 128), (64, 64)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_decoded_small_is_nearly_the_picture_decoded_in_full(width: int, height: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data, sizes = file(smooth(width, height), "jpeg", quality=95, exif=exif), buckets(64, 8, 2)
    near, full = fitted(data, sizes), load_image(data)
    full = fit(full, nearest_bucket(*full.size, sizes))
    assert near.size == full.size
    assert np.abs(to_array(near).astype(int) - to_array(full)).mean() < 1.5
    assert fitted(data, sizes).tobytes() == near.tobytes()


def test_no_jpeg_is_decoded_under_twice_the_wanted_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, *args: object) -> Image.Image:
        seen.append(self.size)
        return resize(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    for side, decoded in ((1024, 128), (1023, 256), (512, 128), (511, 256), (256, 128), (255, 255), (100, 100)):
        fitted(file(smooth(side, side), "jpeg"), 64)
        assert seen.pop() == (decoded, decoded)
    fitted(file(smooth(1024, 1024), "png"), 64)
    assert seen.pop() == (1024, 1024)


# Numbers ------------------------------------------------------------------------------------------------------------

def test_pixels_survive_the_tensor() -> None:
    array = RNG.integers(0, 256, (2, 4, 5, 3), np.uint8)
    assert np.array_equal(to_uint8(to_tensor(array)), array)
    assert load_image(to_png(array[0])).tobytes() == array[0].tobytes()


@pytest.mark.gpu
def test_a_gpu_gets_the_same_bits() -> None:
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert torch.equal(to_tensor(array, "cuda").cpu(), to_tensor(array))
