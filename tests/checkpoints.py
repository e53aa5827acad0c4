"""What the tests of runs look at: every tensor of a checkpoint, and which checkpoints are whole."""

import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mmllm.config import Pretrain


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizer's too."""
    reader = FileSystemReader(str(checkpoint))
    entries = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()
             if isinstance(entry, TensorStorageMetadata)}
    with warnings.catch_warnings(action="ignore"):                              # it remarks that this is one process
        load(state, storage_reader=reader, no_dist=True)
    return state


def same(one: Path, other: Path) -> bool:
    """Bit for bit."""
    ours, expected = everything(one), everything(other)
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def whole_checkpoints(recipe: Pretrain) -> list[str]:
    return sorted(path.name for path in (recipe.out / "checkpoints").iterdir() if path.suffix == "")
