"""Token shards say what raw shards say, byte for byte the same however they were made; what is bad is left out by count or named."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_model import sentences, text_tokenizer, visual_tokenizer, vocabulary

from data import shards
from data.config import DataConfig
from data.document import ANSWER, CAPTION, IMAGE, QUESTION, TEXT, Document, TokenDocument
from data.encode import ProcessFailed, encode, fingerprint
from data.images import Limits, fitted, to_array, to_png, to_tensor
from data.index import index_path, read_index
from data.loader import Loader
from data.tokens import Encoding, ImageEncoder, ahead, encode_shards
from data.vocab import Vocab
from tokenizer.grid import buckets
from tokenizer.text import TextTokenizer


class PatchMeans:
    """An encoder of several sizes: a code is the mean of a patch of 8 pixels in 32 steps, and of its left half."""

    image_size = 32
    fingerprint = "patch means"
    sizes = buckets(32, 8, 4)

    def encode(self, images: torch.Tensor, scale: int = 1) -> torch.Tensor:
        assert images.shape[-2:] in self.sizes
        patches = images.mean(1).unfold(1, 8, 8).unfold(2, 8, 8)  # [b, h, w, 8, 8]
        return torch.stack([(part.mean((-1, -2)) * 15.9 + 16).int() for part in (patches, patches[..., :4])], 1)


MEANS = PatchMeans()
VOCAB = Vocab(text_tokenizer().size, 32, 2, tuple((h // 8, w // 8) for h, w in MEANS.sizes))


def png(number: int, square: bool = False) -> bytes:
    rng = np.random.default_rng(number)
    height, width = (24, 24) if square else rng.integers(5, 70, 2)
    return to_png(rng.integers(0, 256, (height, width, 3), np.uint8))


def documents(count: int, square: bool = False) -> Iterator[Document]:
    """Of no, one and several pictures, with captions and questions, in several orders."""
    words = iter(sentences(10 * count, seed=2))
    for i in range(count):
        picture = [png(10 * i + j, square) for j in range(3)]
        parts = ((next(words), picture[0]), (picture[0], next(words), picture[1], picture[2], next(words)), (next(words),),
                 (picture[0],))[i % 4]
        yield Document(f"d{i:03d}", parts, (next(words),) * (i % 3), ((next(words), next(words)), ("", next(words)))[:i % 3], {"n": i})


def raw(folder: Path, count: int = 40, shard_len: int = 15, square: bool = False) -> list[Path]:
    return shards.write(documents(count, square), folder, "train", shard_len)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens_of(shard: Path) -> list[TokenDocument]:
    index, data = read_index(shard), shard.read_bytes()
    return [TokenDocument.from_bytes(data[o:o + n]) for o, n in zip(index.offsets, index.sizes, strict=True)]


def plainly(document: Document, visual: ImageEncoder, sizes: Sequence[tuple[int, int]], text: TextTokenizer,
            vocab: Vocab) -> list[tuple[int, tuple[int, int], list[int]]]:
    """(kind, grid, ids) of each part, everything by itself."""
    def picture(part: bytes) -> tuple[int, tuple[int, int], list[int]]:
        codes: NDArray[np.int32] = visual.encode(to_tensor(to_array(fitted(part, sizes))[None]))[0].numpy()
        return IMAGE, (codes.shape[1], codes.shape[2]), vocab.image_ids(codes).tolist()

    said = [(CAPTION, caption) for caption in document.captions]
    said += [pair for q, a in document.questions for pair in ((QUESTION, q), (ANSWER, a))]
    return [picture(part) if isinstance(part, bytes) else (TEXT, (0, 0), text.encode(part)) for part in document.parts] + [
        (kind, (0, 0), text.encode(words)) for kind, words in said]


def same(tokens: TokenDocument, plain: list[tuple[int, tuple[int, int], list[int]]]) -> bool:
    return [(kind, grid, tokens.part(i).tolist()) for i, (kind, grid) in enumerate(zip(tokens.kinds, tokens.grids, strict=True))] == plain


class World(NamedTuple):
    raw: list[Path]
    tokens: Path
    fingerprint: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """40 documents in three shards, encoded."""
    folder = tmp_path_factory.mktemp("world")
    source = raw(folder / "raw")
    encode(source, folder / "tokens", MEANS, text_tokenizer(), VOCAB)
    return World(source, folder / "tokens", fingerprint(MEANS.fingerprint, text_tokenizer().fingerprint, VOCAB))


def copied(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.tokens, tmp_path / "tokens"))


# What is written --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_len", [1, 3, 256])
def test_batches_by_bucket_give_each_document_what_it_has_alone(tmp_path: Path, batch_len: int) -> None:
    source = raw(tmp_path / "raw")
    encode(source, tmp_path / "out", MEANS, text_tokenizer(), VOCAB, batch_len=batch_len)
    grids: set[tuple[int, int]] = set()
    for path in source:
        found, wanted = tokens_of(tmp_path / "out" / path.name), list(shards.read(path))
        assert read_index(tmp_path / "out" / path.name).keys.tolist() == [d.key.encode() for d in wanted]
        assert all(same(a, plainly(b, MEANS, MEANS.sizes, text_tokenizer(), VOCAB)) for a, b in zip(found, wanted, strict=True))
        grids |= {grid for tokens in found for grid in tokens.grids}
    assert len(grids) > 4


def test_a_real_tokenizer_gets_the_batches_of_the_plain_loop(tmp_path: Path) -> None:
    visual, text, vocab = visual_tokenizer(), text_tokenizer(), vocabulary()
    (path,) = raw(tmp_path / "raw", 60, 60, square=True)
    encode([path], tmp_path / "out", visual, text, vocab, batch_len=16)
    pictures = np.stack([to_array(fitted(part, 24)) for d in shards.read(path) for part in d.parts if isinstance(part, bytes)])
    codes = [row for i in range(0, len(pictures), 16) for row in visual.encode(to_tensor(pictures[i:i + 16])).numpy()]
    ids = [tokens.part(i).tolist() for tokens in tokens_of(tmp_path / "out" / path.name) for i, k in enumerate(tokens.kinds) if k == IMAGE]
    assert ids == [vocab.image_ids(each).tolist() for each in codes]


def test_texts_in_one_call_are_texts_one_by_one() -> None:
    text, words = text_tokenizer(), [*sentences(300), "", " ", "naïve ☃\n", *sentences(300)]
    assert text.encode_all(words) == [text.encode(each) for each in words] and text.encode_all([]) == []


def test_the_manifest_counts_what_is_there(world: World) -> None:
    manifest = json.loads((world.tokens / "manifest.json").read_text())
    parts = [part for document in shards.read_all(world.raw) for part in document.parts]
    tokens = [each for path in world.raw for each in tokens_of(world.tokens / path.name)]
    assert manifest["documents"] == 40 and manifest["images"] == sum(isinstance(part, bytes) for part in parts)
    assert manifest["skipped"] == {}
    assert manifest["image_codes"] + manifest["text_ids"] == sum(len(each.ids) for each in tokens)
    assert manifest["fingerprint"] == world.fingerprint and Vocab.of(manifest["vocab"]) == VOCAB


def test_a_grid_without_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a code grid of \d+x\d+ has no control token: Vocab.grids has"):
        encode(raw(tmp_path / "raw"), tmp_path / "out", MEANS, text_tokenizer(), dataclasses.replace(VOCAB, grids=((4, 4),)))


def test_progress_is_told_in_shards_and_images_a_second(tmp_path: Path) -> None:
    told: list[tuple[int, int, Mapping[str, float]]] = []
    source = raw(tmp_path / "raw")
    for _ in range(2):
        encode(source, tmp_path / "out", MEANS, text_tokenizer(), VOCAB, lambda *words: told.append(words), batch_len=4)
    assert told[0] == (0, 3, {}) and told[-1] == (3, 3, {}) and [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert max(measures.get("images/s", 0) for _, _, measures in told) > 0


# Interruption, processes, nodes -----------------------------------------------------------------------------------

def test_encoding_continues_after_an_interruption_and_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    folder = copied(world, tmp_path)
    index_path(folder / "train-000001.tar").unlink()  # written but not indexed: redone
    (folder / "train-000002.tar").unlink()
    index_path(folder / "train-000002.tar").unlink()
    (folder / "train-000002.tar.partial").write_bytes(b"half")
    (folder / "manifest.json").unlink()
    encode(world.raw, folder, MEANS, text_tokenizer(), VOCAB)
    assert files(folder) == files(world.tokens)


def test_nodes_share_the_shards_and_the_last_writes_the_manifest(tmp_path: Path) -> None:
    source = raw(tmp_path / "raw", 60)
    encode(source, tmp_path / "one", MEANS, text_tokenizer(), VOCAB)
    for node in (1, 2, 0):
        manifest = encode(source, tmp_path / "three", MEANS, text_tokenizer(), VOCAB, node=(node, 3))
        assert manifest.exists() == (node == 0)
        assert index_path(tmp_path / "three" / source[node].name).exists()
    assert files(tmp_path / "three") == files(tmp_path / "one")
    with pytest.raises(ValueError, match=r"node \(3, 3\)"):
        encode(source, tmp_path / "three", MEANS, text_tokenizer(), VOCAB, node=(3, 3))


def test_several_processes_need_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each of 2 processes loads the tokenizers itself: give their paths"):
        encode(raw(tmp_path / "raw"), tmp_path / "out", MEANS, text_tokenizer(), VOCAB, processes=2)


def saved(tmp_path: Path) -> tuple[Path, Path]:
    visual_tokenizer().save(tmp_path / "visual")
    text_tokenizer().save(tmp_path / "text.model")
    return tmp_path / "visual", tmp_path / "text.model"


def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    source, paths = raw(tmp_path / "raw", 50, 10, square=True), saved(tmp_path)
    encode(source, tmp_path / "one", *paths, vocabulary())
    encode(source[:1], tmp_path / "two", visual_tokenizer(), text_tokenizer(), vocabulary())  # goes on from there
    told: list[int] = []
    encode(source, tmp_path / "two", *paths, vocabulary(), lambda done, total, measures: told.append(done), processes=2)
    assert files(tmp_path / "two") == files(tmp_path / "one") and told[0] == 1 and told[-1] == 5


@pytest.mark.slow
def test_a_killed_or_refused_process_ends_the_others_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, paths = raw(tmp_path / "raw", 600, 20, square=True), saved(tmp_path)
    whole = source[-1].read_bytes()
    source[-1].write_bytes(whole[:5000])

    def kill(done: int, total: int, measures: Mapping[str, float]) -> None:
        if measures:
            pid = multiprocessing.active_children()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ProcessFailed, match="ended with exit code -9 and no word"):
        encode(source, tmp_path / "two", *paths, vocabulary(), kill, processes=2, batch_len=4)
    with pytest.raises(ValueError, match=r"train-000029.tar is truncated"):
        encode(source, tmp_path / "two", *paths, vocabulary(), processes=2, batch_len=4)
    assert not multiprocessing.active_children() and not (tmp_path / "two/manifest.json").exists()
    source[-1].write_bytes(whole)
    encode(source, tmp_path / "two", *paths, vocabulary(), processes=2, batch_len=4)
    encode(source, tmp_path / "one", *paths, vocabulary(), batch_len=4)
    assert {name: content for name, content in files(tmp_path / "two").items() if "partial" not in name} == files(tmp_path / "one")


def test_items_made_ahead_keep_their_order_and_pass_on_errors() -> None:
    made: list[int] = []

    def items(fail: int) -> Iterator[int]:
        for i in range(20):
            if i == fail:
                raise ValueError("the 7th")
            made.append(i)
            yield i

    for number, item in enumerate(ahead(items(99), 3)):
        assert item == number and len(made) <= number + 5
    got: list[int] = []
    with pytest.raises(ValueError, match="the 7th"):
        got.extend(ahead(items(7), 3))
    assert got == list(range(7))
    made.clear()
    assert next(ahead(items(99), 3)) == 0 and len(made) <= 5  # dropped at once: its thread ends


# Bad input --------------------------------------------------------------------------------------------------------

def spoilt(folder: Path) -> Path:
    """50 documents; one with a second picture that does not decode, one too large, one without its json, one with a number for a text."""
    samples = [shards.sample_of(document) for document in documents(50)]
    samples[5]["2.png"] = b"junk"
    samples[12]["1.png"] = to_png(np.zeros((200, 200, 3), np.uint8))
    del samples[20]["json"]
    samples[30]["json"] = b'{"texts": [7], "images": [null]}'
    folder.mkdir()
    shards.write_tar(folder / "train-000000.tar", samples)
    return folder / "train-000000.tar"


def test_bad_documents_are_left_out_whole_and_counted_by_cause(tmp_path: Path) -> None:
    path = spoilt(tmp_path / "raw")
    manifest = encode([path], tmp_path / "out", MEANS, text_tokenizer(), VOCAB, max_bad=0.08, limits=Limits(max_pixels=30_000))
    index = read_index(tmp_path / "out" / path.name)
    good = [d for i, d in enumerate(documents(50)) if i not in (5, 12, 20, 30)]
    assert index.keys.tolist() == [d.key.encode() for d in good]
    assert all(same(a, plainly(b, MEANS, MEANS.sizes, text_tokenizer(), VOCAB))
               for a, b in zip(tokens_of(tmp_path / "out" / path.name), good, strict=True))
    record = json.loads(manifest.read_text())
    assert record["documents"] == 46
    assert record["skipped"] == dict(index.skipped.causes) == {"does not decode as a picture": 1, "no document": 2, "too large": 1}
    assert index.skipped.first["too large"].startswith("d012: picture has 200x200")


def test_past_the_budget_everything_is_counted_and_nothing_written(tmp_path: Path) -> None:
    path = spoilt(tmp_path / "raw")
    with pytest.raises(ValueError, match=r"train-000000.tar: 3 of 50 documents are bad, more than max_bad = 4.00%: 1 × does not decode "
                                         r"as a picture \(first: d005: .*2 × no document \(first: d020: it has no d020.json"):
        encode([path], tmp_path / "out", MEANS, text_tokenizer(), VOCAB, max_bad=0.04)
    assert list(files(tmp_path / "out")) == ["fingerprint"]


def test_the_budget_is_rounded_up_to_a_whole_document(tmp_path: Path) -> None:
    bad = dataclasses.replace(next(documents(1)), key="bad", parts=(b"junk",))
    source = shards.write([bad, *documents(9)], tmp_path / "raw", "train")
    encode(source, tmp_path / "out", MEANS, text_tokenizer(), VOCAB, max_bad=0.0001)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["documents"] == 9


def test_without_a_budget_the_first_bad_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train-000000.tar: sample d005: does not decode as a picture: .*set max_bad"):
        encode([spoilt(tmp_path / "raw")], tmp_path / "out", MEANS, text_tokenizer(), VOCAB)
    assert list(files(tmp_path / "out")) == ["fingerprint"]


def test_a_shard_of_nothing_good_is_an_empty_shard(tmp_path: Path) -> None:
    source = [spoilt(tmp_path / "raw")]
    encode(source, tmp_path / "out", MEANS, text_tokenizer(), VOCAB, max_bad=1.0, limits=Limits(min_side=100))
    assert read_index(tmp_path / "out" / source[0].name).kinds.tolist().count(IMAGE) <= 1
    shards.write_tar(source[0], [{"__key__": "a", "1.png": b"junk"}])
    index_path(tmp_path / "out" / source[0].name).unlink()
    encode(source, tmp_path / "out", MEANS, text_tokenizer(), VOCAB, max_bad=1.0)
    assert len(read_index(tmp_path / "out" / source[0].name).keys) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_every_kind_are_encoded(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tiff"
    Image.new("RGB", (40, 40), "white").convert(mode).save(path, format="tiff" if mode == "CMYK" else "png")
    source = shards.write([Document("a", (path.read_bytes(),)), Document("b", (to_png(np.full((32, 32, 3), 255, np.uint8)),))],
                          tmp_path / "raw", "train")
    encode(source, tmp_path / "out", MEANS, text_tokenizer(), VOCAB)
    a, b = tokens_of(tmp_path / "out" / source[0].name)
    assert np.array_equal(a.ids, b.ids)


# Fingerprints -----------------------------------------------------------------------------------------------------

def test_every_shard_carries_the_fingerprint_and_one_of_another_is_refused(world: World, tmp_path: Path) -> None:
    folder = copied(world, tmp_path)
    assert {read_index(folder / path.name).fingerprint for path in world.raw} == {world.fingerprint}
    with pytest.raises(ValueError, match=rf"train-000001.tar was encoded under fingerprint {world.fingerprint}, not 0123"):
        read_index(folder / "train-000001.tar", "0123")
    for _ in encode_shards([(world.raw[1], folder / "train-000001.tar")], MEANS, text_tokenizer(), VOCAB, "4567", Encoding()):
        pass
    with pytest.raises(ValueError, match=rf"train-000001.tar was encoded under fingerprint 4567, not {world.fingerprint}: "):
        encode(world.raw, folder, MEANS, text_tokenizer(), VOCAB)
    with pytest.raises(ValueError, match=r"index of token shard .*train-000001.tar is not the one in the manifest"):
        Loader(DataConfig(shards=folder), world.fingerprint).row(0)


def test_an_index_without_a_fingerprint_is_refused(world: World, tmp_path: Path) -> None:
    folder = copied(world, tmp_path)
    path = index_path(folder / "train-000000.tar")
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays if name not in ("fingerprint", "skipped")}
    np.savez(path, **kept)
    with pytest.raises(ValueError, match=r"index of token shard .*train-000000.tar is damaged.*fingerprint"):
        read_index(folder / "train-000000.tar")


def test_a_folder_of_another_tokenizer_is_not_written_into(world: World, tmp_path: Path) -> None:
    folder = copied(world, tmp_path)
    other = dataclasses.replace(VOCAB, codebook_size=64)
    with pytest.raises(ValueError, match="the tokenizer or the vocabulary changed"):
        encode(world.raw, folder, MEANS, text_tokenizer(), other)
    assert files(folder) == files(world.tokens)
