"""Our tar reader and writer do what tarfile and webdataset do, or leave it to them."""

import io
import random
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from data import shards, tar


def samples(count: int) -> list[dict[str, object]]:
    rng = random.Random(0)
    return [{"__key__": f"{'näïve' * (i % 3)}{'k' * rng.randint(1, 130)}{i}", "0.png": rng.randbytes(i),
             "json": rng.randbytes(rng.choice((0, 1, 511, 512, 513, 3000)))} for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_what_is_written_is_what_webdataset_writes(tmp_path: Path, count: int) -> None:
    theirs = io.BytesIO()
    with wds.TarWriter(theirs, encoder=False, mtime=0, user="", group="") as writer:
        for sample in samples(count):
            writer.write(sample)
    shards.write_tar(tmp_path / "x.tar", samples(count))
    assert (tmp_path / "x.tar").read_bytes() == theirs.getvalue()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("longest", [20, 90, 200])
def test_any_tar_reads_as_webdataset_reads_it(tmp_path: Path, kind: int, longest: int) -> None:
    rng = random.Random(longest)
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as file:
        for folder in ("", "a/", "./b.c/"):
            if folder:
                info = tarfile.TarInfo(folder)
                info.type = tarfile.DIRTYPE
                file.addfile(info)
            for i in range(6):
                for extension in ("JPG", "0.png", "json", ""):
                    info = tarfile.TarInfo(f"{folder}{'d' * rng.randint(1, min(90, longest))}/{i:0{rng.randint(1, longest)}d}.{extension}"
                                           if i % 2 else f"{folder}{i}.{extension}".rstrip("."))
                    info.size = rng.randint(0, 2000)
                    if len(info.name) < 250 and (kind != tarfile.USTAR_FORMAT or len(info.name) <= 100):
                        file.addfile(info, io.BytesIO(rng.randbytes(info.size)))
        for name in ("__meta__", "__x__/y.txt"):
            file.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "0.json"
        if longest == 200:
            file.addfile(link)
    with (tmp_path / "x.tar").open("rb") as stream:
        files = tar_file_expander([{"url": "", "stream": stream}])
        theirs = [{name: value for name, value in sample.items() if name != "__url__"} for sample in group_by_keys(files)]
    assert list(shards.samples(tmp_path / "x.tar")) == theirs and len(theirs) >= 9


def test_files_are_found_behind_long_names_and_between_links_and_sparse_ones_are_refused(tmp_path: Path) -> None:
    shards.write_tar(tmp_path / "x.tar", [{"__key__": "a", "txt": b"words"}])
    data = (tmp_path / "x.tar").read_bytes()
    assert tar.members(data) == [tar.Member("a.txt", 512, 5)] and data[512:517] == b"words"
    assert tar.members(one("long" * 40)) == [tar.Member("long" * 40, 1536, 0)]
    assert tar.members(one("a", tarfile.SYMTYPE)) == tar.members(one("a", tarfile.LNKTYPE)) == []
    with pytest.raises(ValueError, match="member a is sparse"):
        tar.members(one("a", fields={"GNU.sparse.size": "5"}))


def one(name: str, kind: bytes = tarfile.REGTYPE, fields: dict[str, str] | None = None) -> bytes:
    """A tar of one empty member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.pax_headers = kind, "b", fields or {}
        file.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize("behind", [0, 1, 4000])
def test_what_follows_the_end_of_a_tar_is_no_silent_loss(tmp_path: Path, behind: int) -> None:
    data = one("a") + bytes(512 * behind) + one("b")
    with pytest.raises(ValueError, match=r"something follows the end of the tar at byte 512: there is more at byte "):
        tar.members(data)
    assert [m.name for m in tar.salvaged(data)[0]] == ["a", "b"]


def test_behind_a_damaged_header_the_rest_is_salvaged_and_nothing_under_another_name(tmp_path: Path) -> None:
    shards.write_tar(tmp_path / "x.tar", samples(8))
    data = (tmp_path / "x.tar").read_bytes()
    whole = tar.members(data)
    for number, member in enumerate(whole):
        at = member.first - 512
        found, damage = tar.salvaged(data[:at + 126] + b"\x00" + data[at + 127:])
        assert found == [*whole[:number], *whole[number + 1:]] and damage[0].startswith(f"the header at byte {at:,} is damaged")
    for member in tar.members(long := one("long" * 40)):
        assert tar.salvaged(long[:126] + b"\xff" + long[127:])[0] == [] and member.first == 1536
    for end in range(0, len(data), 700):
        found, damage = tar.salvaged(data[:end])
        assert found == [m for m in whole if m.first + m.size <= end] and bool(damage) == (end < whole[-1].first + 1024)


def test_a_flipped_bit_in_a_header_is_named(tmp_path: Path) -> None:
    shards.write_tar(tmp_path / "x.tar", samples(5))
    data = bytearray((tmp_path / "x.tar").read_bytes())
    second = tar.members(bytes(data))[1].first - 512  # type: ignore[index]
    data[second + 126] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x.tar is truncated or no tar, after 0 whole samples: the header at byte {second:,} is damaged"):
        list(shards.samples(tmp_path / "x.tar"))


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        tar.write(file, [("a.txt", b"1"), ("a.TXT", b"2")])
    with pytest.raises(ValueError, match=r"there are two members a\.txt"):
        list(shards.samples(tmp_path / "x.tar"))
