"""Raw shards hold documents whole; what is damaged is named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data import shards
from data.document import Document
from data.images import to_png
from data.scenes import shards as scene_shards
from data.scenes.world import World


def png(seed: int = 0, size: int = 8) -> bytes:
    return to_png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


DOCUMENTS = [Document(f"d{i}", ("before", png(i), "naïve ☃"), ("a caption",), (("how many?", "two"),), {"n": i}) for i in range(5)]


def test_documents_survive_a_shard(tmp_path: Path) -> None:
    paths = shards.write(DOCUMENTS, tmp_path, "train", shard_len=2)
    assert [p.name for p in paths] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert list(shards.read_all(shards.find(tmp_path, "train"))) == DOCUMENTS


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    shards.write(DOCUMENTS, tmp_path, "train")
    samples = list(wds.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [d.key for d in DOCUMENTS]
    assert samples[0]["1.png"] == DOCUMENTS[0].parts[1] and json.loads(samples[0]["json"])["texts"] == ["before", None, "naïve ☃"]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        shards.write(DOCUMENTS, tmp_path / name, "x")
    assert (tmp_path / "a/x-000000.tar").read_bytes() == (tmp_path / "b/x-000000.tar").read_bytes()


@pytest.mark.parametrize("cut", [100, 512, 1024, 1536, 4000])
def test_a_truncated_tar_is_named_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    (path,) = shards.write(DOCUMENTS, tmp_path, "train")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"train-000000.tar is truncated"):
        list(shards.read(path))


@pytest.mark.parametrize(("members", "said"), [
    ({"a.txt": b"x"}, "has no a.json"),
    ({"a.json": b"{"}, "no document: a.json"),
    ({"a.json": b'{"texts": [], "images": []}'}, "are empty"),
    ({"a.json": b'{"texts": [1], "images": [null]}'}, "a text is 1"),
    ({"a.json": b'{"texts": ["\\ud800"], "images": [null]}'}, "surrogates not allowed"),
    ({"a.json": b'{"texts": ["x"], "images": [null], "questions": [["q"]]}'}, "not enough values"),
    ({"a.json": b'{"texts": ["x"], "images": ["0.png"]}'}, "must be null"),
    ({"a.json": b'{"texts": [null], "images": ["0.png"]}'}, "names picture 0.png"),
])
def test_a_sample_that_is_no_document_is_named_with_its_shard(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=rf"s.tar: sample a.*{said}"):
        list(shards.read(tmp_path / "s.tar"))


def test_an_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no shard"):
        shards.find(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        shards.find(tmp_path / "none")


def test_a_key_with_a_dot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a.b' holds a dot"):
        shards.write([Document("a.b", ("x",))], tmp_path, "t")


# Scenes -----------------------------------------------------------------------------------------------------------

def test_scene_documents_are_a_pure_function_of_their_number() -> None:
    world = World.at_level(1)
    whole = list(scene_shards.documents(world, 3, "train", 0, 20))
    assert list(scene_shards.documents(world, 3, "train", 15, 5)) == whole[15:]
    assert [len(d.parts) for d in whole].count(4) == 2 and len({d.key for d in whole}) == 20
