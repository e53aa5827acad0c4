"""Duplicates are what the slow obvious comparison of all documents finds, and copies of a picture are."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data import shards
from data.curate import hamming, signatures
from data.curate.duplicates import Alike, dedup, verdicts
from data.curate.signatures import Signatures
from data.document import Document


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@st.composite
def hashes(draw: st.DrawFn) -> list[int]:
    """Clouds of hashes a few bits apart, some equal."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.lists(st.integers(0, 63), max_size=9)
    out = list[int]()
    for centre, flipped in draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=40)):
        for bit in flipped:
            centre ^= 1 << bit
        out.append(centre)
    return out


@given(hashes(), st.integers(0, hamming.FARTHEST), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_near_pairs_are_those_of_all_pairs(values: list[int], within: int, kinds: int) -> None:
    apart = [i % kinds for i in range(len(values))]
    expected = {(i, j, bits(values[i], values[j])) for j in range(len(values)) for i in range(j)
                if apart[i] == apart[j] and bits(values[i], values[j]) <= within}
    found = hamming.near(np.array(values, np.uint64), within, np.array(apart, np.uint64))
    pairs = list(zip(found.first.tolist(), found.second.tolist(), found.distance.tolist(), strict=True))
    assert len(pairs) == len(expected) and set(pairs) == expected


@pytest.mark.parametrize("within", [1, 4, 8])
def test_planted_pairs_are_found_among_many(within: int) -> None:
    random = np.random.default_rng(within)
    values = random.integers(0, 2**64 - 1, 20_000, np.uint64)
    flipped = np.array([sum(1 << int(bit) for bit in random.choice(64, within, replace=False)) for _ in range(100)], np.uint64)
    values[-100:] = values[:100] ^ flipped
    found = hamming.near(values, within)
    assert {(i, 19_900 + i) for i in range(100)} <= set(zip(found.first.tolist(), found.second.tolist(), strict=True))


def test_a_distance_that_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="distance is 17"):
        hamming.near(np.zeros(2, np.uint64), 17)


# Documents --------------------------------------------------------------------------------------------------------

Signed = tuple[list[tuple[int, int]], int]
"""(pixels, look) of pictures, text"""


def signatures_of(documents: list[Signed]) -> Signatures:
    pictures = [picture for pictures, _ in documents for picture in pictures]
    table = np.array(pictures, np.uint64).reshape(-1, 2)
    first = np.cumsum([0, *(len(pictures) for pictures, _ in documents)])
    return Signatures(first=first, text=np.array([text for _, text in documents], np.uint64), pixels=table[:, 0], look=table[:, 1],
                      area=(table[:, 0] % 3 + 1).astype(np.int32), good=np.ones(len(documents), np.bool_),
                      shard=np.array([0, len(documents)]))


def alike(one: Signed, other: Signed, how: Alike) -> bool:
    if len(one[0]) != len(other[0]) or ((how.by == "both" or not one[0]) and one[1] != other[1]):
        return False
    return all(a[0] == b[0] if how.exact else bits(a[1], b[1]) <= how.distance for a, b in zip(one[0], other[0], strict=True))


@st.composite
def documents(draw: st.DrawFn) -> list[Signed]:
    looks = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    picture = st.builds(lambda look, bit, more: (look * 8 + bit * 2 + more & 2**64 - 1, look ^ 1 << bit),
                        st.sampled_from(looks), st.integers(0, 5), st.integers(0, 1))
    return draw(st.lists(st.tuples(st.lists(picture, max_size=3), st.integers(0, 1)), max_size=24))


@given(documents(), st.builds(Alike, exact=st.booleans(), distance=st.integers(0, 3), by=st.sampled_from(["pictures", "both"]),
                              keep=st.sampled_from(["first", "largest"])))
@settings(max_examples=150, deadline=None)
def test_verdicts_are_those_of_comparing_each_document_with_all_that_were_kept(found: list[Signed], how: Alike) -> None:
    keys = [f"{number * 7919 % 1009:04}" for number in range(len(found))]

    def keys_of(which: NDArray[np.int64]) -> NDArray[np.bytes_]:
        return np.array([keys[i] for i in which.tolist()], "S4")

    size = {i: sum(pixels % 3 + 1 for pixels, _ in found[i][0]) for i in range(len(found))}
    order = sorted(range(len(found)), key=lambda i: (-size[i] if how.keep == "largest" else 0, keys[i]))
    kept = list[int]()
    for i in order:
        if not any(alike(found[i], found[k], how) for k in kept):
            kept.append(i)
    result = verdicts(signatures_of(found), how, keys_of)
    assert np.flatnonzero(result.of == 0).tolist() == sorted(kept)
    assert sorted(result.dropped.tolist()) == sorted(set(range(len(found))) - set(kept))
    for stays, goes in zip(result.kept.tolist(), result.dropped.tolist(), strict=True):
        assert stays in kept and alike(found[stays], found[goes], how)


# Shards -----------------------------------------------------------------------------------------------------------

def scene(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def file(picture: Image.Image, form: str = "PNG", **how: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **how)
    return out.getvalue()


def raw(folder: Path) -> Path:
    """Twelve pictures, and copies of four in another shard."""
    shards.write([Document(f"a{i:02}", (file(scene(i)), f"scene {i}")) for i in range(12)], folder, "train", 6)
    copies = [Document("b00", (file(scene(0), "WEBP", lossless=True), "other words")),  # the same pixels
              Document("b01", (file(scene(1), "JPEG", quality=50), "scene 1")),
              Document("b02", (file(scene(2).resize((160, 120)), "JPEG"), "scene 2")),
              Document("b03", (file(scene(3).resize((48, 36))), "scene 3")),
              Document("c0", ("only   words",)), Document("c1", ("only words",)), Document("c2", ("words only",)),
              Document("d0", (b"no picture", "broken"))]
    shards.write(copies, folder, "zz")
    return folder


def keys(folder: Path) -> list[str]:
    return sorted(document.key for document in shards.read_all(shards.find(folder)))


def test_copies_are_found_whatever_file_they_are_and_all_is_accounted_for(tmp_path: Path) -> None:
    source = shards.find(raw(tmp_path / "raw"))
    report = dedup(source, tmp_path / "out", Alike())
    originals = [f"a{i:02}" for i in range(12)]
    assert keys(tmp_path / "out") == [*originals, "c0", "c2"]
    assert report.read == 20 == report.kept + report.dropped.causes.total()
    assert dict(report.dropped.causes) == {"exact duplicate": 2, "near duplicate": 3, "does not decode as a picture": 1}
    groups = [json.loads(line) for line in (tmp_path / "out" / "groups.jsonl").read_text().splitlines()]
    assert {(group["kept"], *(name for name, _ in group["dropped"])) for group in groups} == {
        *((f"train-000000.tar/a0{i}", f"zz-000000.tar/b0{i}") for i in range(4)), ("zz-000000.tar/c0", "zz-000000.tar/c1")}
    assert json.loads((tmp_path / "out" / "curation.json").read_text())["dropped"]["near duplicate"] == [3, "b01"]


def test_exact_ones_need_equal_pixels_and_both_needs_equal_words(tmp_path: Path) -> None:
    source = shards.find(raw(tmp_path / "raw"))
    assert dedup(source, tmp_path / "exact", Alike(exact=True)).dropped.causes["exact duplicate"] == 2
    assert {"b01", "b02", "b03"} <= set(keys(tmp_path / "exact"))
    dedup(source, tmp_path / "both", Alike(by="both"))
    assert "b00" in keys(tmp_path / "both") and not {"b01", "b02", "b03"} & set(keys(tmp_path / "both"))


def test_the_largest_stays_where_it_is_asked_for(tmp_path: Path) -> None:
    dedup(shards.find(raw(tmp_path / "raw")), tmp_path / "out", Alike(keep="largest"))
    assert "b02" in keys(tmp_path / "out") and "a02" not in keys(tmp_path / "out") and "a03" in keys(tmp_path / "out")


def test_what_another_set_holds_is_left_out_wherever_it_is_shown(tmp_path: Path) -> None:
    source = shards.find(raw(tmp_path / "raw"))
    shards.write([Document("long", ("see", file(scene(40)), "and", file(scene(5)), "and", file(scene(41))))], tmp_path / "raw", "long")
    shards.write([Document("e", (file(scene(5), "JPEG"), "which?")), Document("t", ("words only",))], tmp_path / "eval", "seen")
    source, held = shards.find(tmp_path / "raw"), shards.find(tmp_path / "eval")
    report = dedup(source, tmp_path / "out", Alike(), held)
    assert report.dropped.causes["in the other set"] == 3 and not {"a05", "long", "c2"} & set(keys(tmp_path / "out"))
    (bad := tmp_path / "bad").mkdir()
    shards.write([Document("e", (b"nothing", "?"))], bad, "seen")
    with pytest.raises(ValueError, match="1 of 1 documents are none"):
        dedup(source, tmp_path / "out2", Alike(), shards.find(bad))


def test_several_processes_and_a_second_call_give_the_same_files(tmp_path: Path) -> None:
    source = shards.find(raw(tmp_path / "raw"))
    dedup(source, tmp_path / "one", Alike())
    dedup(source, tmp_path / "two", Alike(), processes=2)
    for name in ("train-000000.tar", "zz-000000.tar"):  # as if it had ended before these
        (tmp_path / "two" / name).unlink()
        (tmp_path / "two" / name).with_suffix(".curation.json").unlink()
    (tmp_path / "two" / "signatures" / "train-000001.npz").unlink()
    dedup(source, tmp_path / "two", Alike())
    names = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.suffix != ".npz")
    assert names == sorted(str(path.relative_to(tmp_path / "two")) for path in (tmp_path / "two").rglob("*") if path.suffix != ".npz")
    for name in names:
        if (tmp_path / "one" / name).is_file():
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_plain_pictures_are_alike_their_equals_alone() -> None:
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    level = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (48, 1, 3))
    looks = [signatures.sign(picture)[1] for picture in (red, blue, Image.fromarray(level), Image.fromarray(level // 2 + 60))]
    assert min(bits(looks[i], looks[j]) for j in range(4) for i in range(j)) > hamming.FARTHEST
    assert signatures.sign(red)[1] == signatures.sign(Image.open(io.BytesIO(file(red))))[1]


def test_equal_pixels_have_equal_hashes_in_any_lossless_file() -> None:
    files = file(scene(1)), file(scene(1), "WEBP", lossless=1)
    png, webp = (Image.open(io.BytesIO(each)).convert("RGB") for each in files)
    assert signatures.sign(png) == signatures.sign(webp) != signatures.sign(scene(2))
