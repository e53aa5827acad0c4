"""Every picture of a source is found once, in order, with its class where it has one."""

import json
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.document import Document
from data.images import to_png
from data.pictures import count, pictures

PNG = to_png(np.zeros((4, 4, 3), np.uint8))


def tar(path: Path, samples: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shards.write_tar(path, samples)


def test_a_folder_gives_its_pictures_with_sub_folders_as_classes(tmp_path: Path) -> None:
    for name in ("cat/b.jpg", "cat/deep/a.PNG", "dog/x.webp", "top.jpeg", "cat/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    found = [(p.name, p.label) for p in pictures(tmp_path)]
    assert found == [("cat/b.jpg", "cat"), ("cat/deep/a.PNG", "cat"), ("dog/x.webp", "dog"), ("top.jpeg", None)]
    assert count(tmp_path) == 4 and next(pictures(tmp_path)).file == PNG


def test_img2dataset_tars_give_theirs_with_cls_as_class(tmp_path: Path) -> None:
    tar(tmp_path / "00000.tar", [{"__key__": "1", "jpg": PNG, "txt": b"a cat", "cls": b"tabby\n"}, {"__key__": "2", "png": PNG},
                                 {"__key__": "3", "txt": b"no picture"}])
    assert [(p.name, p.label) for p in pictures(tmp_path)] == [("00000.tar/1.jpg", "tabby"), ("00000.tar/2.png", None)]
    assert count(tmp_path) == 2 and count(tmp_path / "00000.tar") == 2


def test_raw_shards_give_every_picture_of_a_document_with_a_field_as_class(tmp_path: Path) -> None:
    documents = [Document("a", (PNG, "and", PNG), meta={"label": "owl", "scene": {"objects": [["star", "red"]]}}), Document("b", (PNG,))]
    shards.write(documents, tmp_path, "train")
    assert [(p.name, p.label) for p in pictures(tmp_path)] == [
        ("train-000000.tar/a.0.png", "owl"), ("train-000000.tar/a.2.png", "owl"), ("train-000000.tar/b.0.png", None)]
    assert [p.label for p in pictures(tmp_path, label="meta.scene.objects.0.1")] == ["red", "red", None]
    assert count(tmp_path) == 3


def test_held_out_shards_are_taken_where_there_are_any_and_others_by_prefix(tmp_path: Path) -> None:
    for split in ("train", "seen"):
        tar(tmp_path / f"{split}-000000.tar", [{"__key__": split, "0.png": PNG, "json": json.dumps({}).encode()}])
    assert [p.name for p in pictures(tmp_path)] == ["seen-000000.tar/seen.0.png"]
    assert [p.name for p in pictures(tmp_path, "train-")] == ["train-000000.tar/train.0.png"]
    with pytest.raises(FileNotFoundError, match=r"no tar named valid\*: give --prefix"):
        next(pictures(tmp_path, "valid"))


def test_a_source_without_pictures_and_a_broken_tar_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        next(pictures(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        count(tmp_path / "nowhere")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"broken\.tar is no tar"):
        count(tmp_path)
