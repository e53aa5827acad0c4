"""Rows of a text embedding: only that tensor is read, only tokens of text are kept, and the choice agrees with the slow obvious one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tokenizer import text_rows
from tokenizer.text_rows import TextRows, read, read_embedding, select

V, PADDED, D = 120, 128, 6


def matrix(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(PADDED, D, generator=torch.Generator().manual_seed(0))
    x[7], x[8] = x[7] * 100, x[8] * 1e-4  # one row far too long, one nearly untrained
    return x.to(dtype)


def write(folder: Path, name: str = "model.embed_tokens.weight", tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder whose tokenizer has ids 0 … V − 1, of which 0 and 1 are named special in two ways and V − 1 is added."""
    folder.mkdir(exist_ok=True)
    save_file(tensors or {name: matrix(), "lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps({
        "model": {"vocab": {f"t{i}": i for i in range(V - 1)}},
        "added_tokens": [{"id": V - 1, "content": "<image>", "special": False}]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "t0", "added_tokens_decoder": {"1": {"content": "t1"}}}))
    return folder


def some(n: int = 60, d: int = 5) -> TextRows:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1)) + 3
    return TextRows(embedding=x, ids=torch.arange(n) * 2, checksum="0" * 16, source="here")


def test_special_added_padding_and_extreme_rows_are_left_out(tmp_path: Path) -> None:
    rows = read(write(tmp_path))
    assert not {0, 1, 7, 8, V - 1} & set(rows.ids.tolist()) and rows.ids.max() < V and len(rows) == V - 3 - 4
    assert rows.embedding.dtype == torch.float32 and torch.equal(rows.embedding, matrix().float()[rows.ids])


def test_the_norms_kept_lie_between_the_quantiles_of_the_text_rows(tmp_path: Path) -> None:
    rows = read(write(tmp_path), quantiles=(0.25, 0.75))
    norms = matrix().float()[2:V - 1].norm(dim=-1)
    low, high = norms.quantile(0.25), norms.quantile(0.75)
    assert rows.ids.tolist() == [i + 2 for i, norm in enumerate(norms) if low <= norm <= high]


@pytest.mark.parametrize("name", text_rows.NAMES)
def test_every_known_name_is_found(tmp_path: Path, name: str) -> None:
    assert read_embedding(write(tmp_path, name)).name == name


@pytest.mark.parametrize("dtype", text_rows.FLOATS)
def test_every_float_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, tensors={"model.embed_tokens.weight": matrix(dtype)})
    assert torch.equal(read_embedding(tmp_path).matrix, matrix(dtype))


def test_of_sharded_weights_only_the_file_with_the_embedding_is_needed(tmp_path: Path) -> None:
    whole = read(write(tmp_path / "whole"))
    write(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors").rename(tmp_path / "parts" / "model-00002-of-00002.safetensors")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "model.embed_tokens.weight": "model-00002-of-00002.safetensors", "lm_head.weight": "model-00001-of-00002.safetensors"}}))
    parts = read(tmp_path / "parts")
    assert torch.equal(parts.embedding, whole.embedding) and parts.checksum == whole.checksum


@pytest.mark.parametrize("kind", ["unigram", "vocab.json"])
def test_other_tokenizer_files_give_the_same_ids(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path)
    expected = text_rows.text_ids(folder)
    if kind == "unigram":
        whole = json.loads((folder / "tokenizer.json").read_text())
        whole["model"]["vocab"] = [[f"t{i}", -float(i)] for i in range(V - 1)]
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    else:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(V - 1)}))
        (folder / "added_tokens.json").write_text(json.dumps({"<image>": V - 1}))
    assert torch.equal(text_rows.text_ids(folder), expected)


def test_a_sentencepiece_model_alone_leaves_out_its_control_pieces(tmp_path: Path) -> None:
    from tokenizer.text import train
    train(["a red star", "a blue ring"] * 9, 290).save(tmp_path / "tokenizer.model")
    ids = text_rows.text_ids(tmp_path)
    assert ids[0] == 1  # 0 is <unk>


def test_the_checksum_is_of_every_row_and_stays_with_a_choice(tmp_path: Path) -> None:
    rows = read(write(tmp_path))
    assert select(rows, 20).checksum == rows.checksum == read(tmp_path).checksum
    other = matrix()
    other[0, 0] += 1  # of a special token, which no choice takes
    save_file({"model.embed_tokens.weight": other}, tmp_path / "model.safetensors")
    assert read(tmp_path).checksum != rows.checksum


def test_spread_is_the_mean_squared_distance_to_all_rows() -> None:
    x = some().embedding
    slow = torch.cdist(x.double(), x.double()).square().mean(1)
    assert torch.allclose(text_rows.spread(x), slow)
    assert select(some(), 9, "spread").ids.tolist() == sorted((2 * slow.topk(9).indices).tolist())


@pytest.mark.parametrize("pool", [1, 4, 1024])
def test_farthest_points_are_the_greedy_ones_for_any_pool(pool: int) -> None:
    x = some().embedding
    taken = [int((x - x.mean(0)).norm(dim=-1).argmax())]
    while len(taken) < 25:
        taken.append(int(torch.cdist(x, x[taken]).amin(1).argmax()))
    assert text_rows.farthest(x, 25, pool).tolist() == taken
    assert sorted(text_rows.farthest(x, len(x), pool).tolist()) == list(range(len(x)))


def test_farthest_points_take_a_double_last() -> None:
    x = torch.cat([some().embedding, some().embedding[:3]])
    assert sorted(i % 60 for i in text_rows.farthest(x, 60).tolist()) == list(range(60))


def test_a_random_choice_follows_its_seed() -> None:
    a, b, c = (select(some(), 10, "random", seed).ids.tolist() for seed in (0, 0, 1))
    assert a == b != c and len(set(a)) == 10


@pytest.mark.parametrize("how", ["spread", "random", "farthest"])
def test_chosen_rows_stay_with_their_ids(how: str) -> None:
    rows, chosen = some(), select(some(), 11, how)  # pyright: ignore[reportArgumentType]
    assert torch.equal(chosen.embedding, rows.embedding[chosen.ids // 2]) and chosen.ids.diff().min() > 0


def test_fewer_rows_than_codes_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"here has 60 usable text rows, the text table asks for 61, .*codebook_size") as error:
        select(some(), 61)
    assert "\n" not in str(error.value)


def test_unfit_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        read(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor its index"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor that is known as an input embedding .* hold vision.embed.weight"):
        read(write(tmp_path, tensors={"vision.embed.weight": torch.zeros(3, 3), "head.weight": torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=r"int8 .* not quantized"):
        read(write(tmp_path, tensors={"model.embed_tokens.weight": matrix().to(torch.int8)}))
    with pytest.raises(ValueError, match=r"ids up to 118, model.embed_tokens.weight has 50 rows"):
        read(write(tmp_path, tensors={"model.embed_tokens.weight": matrix()[:50].clone()}))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="put the tokenizer beside the weights"):
        read(tmp_path)
