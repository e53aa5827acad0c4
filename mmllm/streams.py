"""Tensors that pass through memory one at a time, between Hugging Face's safetensors and megatron-core's distributed checkpoints.

A `Lazy` tensor says its shape and is made when asked for, so a mapping of names to them is a whole model that weighs nothing. Both
formats are written in one pass from such a mapping; the largest tensor decides the memory, not the model.

    safetensors     bytes of the header as little-endian u64 | header: JSON, name → dtype, shape, first and last byte | the data
                    (github.com/huggingface/safetensors, README, "Format")
    checkpoint      `torch.distributed.checkpoint` files, `.metadata` with the place of every chunk, metadata.json and common.pt
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32",
         torch.uint8: "U8", torch.bool: "BOOL"}
"""What safetensors calls them."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor] | Mapping[str, Lazy]


def made(tensor: Tensor | Lazy) -> Tensor:
    """As a whole, in this process's memory."""
    return (tensor.make() if isinstance(tensor, Lazy) else tensor.detach()).cpu().contiguous()


def size_of(tensor: Tensor | Lazy) -> int:
    return tensor.bytes if isinstance(tensor, Lazy) else tensor.nbytes


# Safetensors ----------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those that its index names, else the only one."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is no index of weights: {error}") from error
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {folder} has no {name}: export or download it again")
    return [folder / name for name in names]


def read(folder: Path) -> dict[str, Lazy]:
    """Every tensor of a model folder, by name."""
    found: dict[str, Lazy] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:  # checks that the file is as long as its header says
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(f"{path}: {name} is {part.get_dtype()}: give weights that are not quantized")
                    found[name] = Lazy(tuple(part.get_shape()), DTYPES[part.get_dtype()], _reader(path, name))
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}): export or download it again") from error
    return found


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        with safe_open(path, "pt") as file:  # opened each time: a file that stays open keeps what was read of it in memory
            return file.get_tensor(name)
    return make


def rows_of(folder: Path, name: str) -> Callable[[int, int], Tensor]:
    """A reader of rows [first, end) of one tensor: of an embedding as large as all the rest."""
    path = next(path for path in weight_files(folder) if _holds(path, name))

    def make(first: int, end: int) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_slice(name)[first:end]
    return make


def _holds(path: Path, name: str) -> bool:
    with safe_open(path, "pt") as file:
        return name in file.keys()  # noqa: SIM118


def write(folder: Path, tensors: Tensors, shard_bytes: int) -> None:
    """`model.safetensors`, or several files with an index where it would be larger than `shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        if filled and filled + size_of(tensors[name]) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size_of(tensors[name])
    if len(shards) == 1:
        write_file(folder / "model.safetensors", {name: tensors[name] for name in shards[0]})
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, {key: tensors[key] for key in shard})
    index = {"metadata": {"total_size": sum(map(size_of, tensors.values()))},
             "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_file(path: Path, tensors: Mapping[str, Tensor | Lazy]) -> None:
    """One safetensors file, tensor after tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + size_of(tensor)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            whole = made(tensor)
            assert whole.dtype == tensor.dtype and tuple(whole.shape) == tuple(tensor.shape), f"{name} is made unlike it was said to be"
            file.write(whole.flatten().view(torch.uint8).numpy().data)


# Distributed checkpoints ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor of a checkpoint, from `offsets` on."""

    offsets: tuple[int, ...]
    part: Lazy


@dataclass(frozen=True)
class Chunked:
    """A tensor of a checkpoint, and the chunks that make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Sequence[Chunk]


def write_checkpoint(folder: Path, tensors: Mapping[str, Chunked]) -> None:
    """What `megatron.core.dist_checkpointing.load` reads under any layout of ranks; `folder` exists and is empty."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    items: list[WriteItem] = []
    parts: dict[MetadataIndex, Lazy] = {}
    entries: dict[str, Any] = {}
    for name, tensor in tensors.items():
        properties, size = TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape)
        places = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.part.shape)) for chunk in tensor.chunks]
        entries[name] = TensorStorageMetadata(properties, size, places)
        for number, (chunk, place) in enumerate(zip(tensor.chunks, places, strict=True)):
            index = MetadataIndex(name, place.offsets, number)
            parts[index] = chunk.part
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(place, properties, size)))

    class Planner:
        """All that the writer asks of one."""

        def resolve_data(self, item: WriteItem) -> Tensor:
            return made(parts[item.index])

    writer = FileSystemWriter(str(folder))
    writer.set_up_storage_writer(True)
    plan, = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])
    planner: Any = Planner()
    writer.finish(Metadata(entries), [writer.write_data(plan, planner).wait()])
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1,
                                                      "common_backend": "torch", "common_backend_version": 1}))


class Checkpoint:
    """A distributed checkpoint, opened to read parts of its tensors; no process group and no megatron-core is needed."""

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.reader = FileSystemReader(str(folder))
        metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(metadata, True)
        entries = metadata.state_dict_metadata
        self.entries = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def part(self, name: str, offsets: Iterable[int], shape: Iterable[int]) -> Tensor:
        """`shape` from `offsets` on of a tensor: of its chunks those are read that overlap."""
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        entry, place = self.entries[name], ChunkStorageMetadata(torch.Size(tuple(offsets)), torch.Size(tuple(shape)))
        out = torch.empty(place.sizes, dtype=entry.properties.dtype)

        class Planner:
            """All that the reader asks of one."""

            def resolve_tensor(self, item: ReadItem) -> Tensor:
                piece = out
                for axis, (first, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                    piece = piece.narrow(axis, first, length)
                return piece

            def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
                pass

        planner: Any = Planner()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.reader.read_data(LoadPlan(create_read_items_for_chunk_list(name, entry, [place])), planner).wait()
        return out
