"""Tensors stream out and in as the libraries that own the formats write and read them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm import streams
from mmllm.streams import Checkpoint, Chunk, Chunked, Lazy

TENSORS = {"a.weight": torch.randn(5, 3), "b": torch.arange(7), "c": torch.randn(2, 3, 4).bfloat16(), "d": torch.zeros(0, 4),
           "e": torch.tensor(2.0, dtype=torch.float16), "f": torch.tensor([True, False])}


def lazy(tensor: Tensor) -> Lazy:
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@pytest.mark.parametrize("shard_bytes", [10**9, 60])
def test_what_is_written_is_what_safetensors_reads(tmp_path: Path, shard_bytes: int) -> None:
    streams.write(tmp_path, {name: lazy(tensor) for name, tensor in TENSORS.items()}, shard_bytes)
    files = streams.weight_files(tmp_path)
    assert (len(files) > 1) == (shard_bytes == 60)
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    ours = {name: tensor.make() for name, tensor in streams.read(tmp_path).items()}
    for found in (theirs, ours):
        assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_rows_are_read_alone(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert torch.equal(streams.rows_of(tmp_path, "a.weight")(1, 4), TENSORS["a.weight"][1:4])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Tensor]:
    """A tensor of 10 × 6 in chunks of 4 × 3 and less."""
    folder, whole = tmp_path_factory.mktemp("streams"), torch.randn(10, 6)
    chunks = [Chunk((i, j), lazy(whole[i:i + 4, j:j + 3])) for i in range(0, 10, 4) for j in range(0, 6, 3)]
    streams.write_checkpoint(folder, {"w": Chunked((10, 6), torch.float32, chunks)})
    return Checkpoint(folder), whole


@given(st.tuples(st.integers(0, 9), st.integers(1, 10)), st.tuples(st.integers(0, 5), st.integers(1, 6)))
def test_any_part_of_a_checkpoint_is_read_whatever_its_chunks(stored: tuple[Checkpoint, Tensor], rows: tuple[int, int],
                                                              columns: tuple[int, int]) -> None:
    checkpoint, whole = stored
    (i, m), (j, n) = (rows[0], min(rows[1], 10 - rows[0])), (columns[0], min(columns[1], 6 - columns[0]))
    assert torch.equal(checkpoint.part("w", (i, j), (m, n)), whole[i:i + m, j:j + n])


def test_a_tensor_is_made_once_and_let_go(tmp_path: Path) -> None:
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def make() -> Tensor:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.zeros(1000).as_subclass(Counted)
    streams.write(tmp_path, {str(i): Lazy((1000,), torch.float32, make) for i in range(20)}, 10**9)
    assert most <= 2
