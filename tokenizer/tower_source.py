"""Where a pretrained tower comes from, in one string, and how its weights are read: from this machine, whole, or not at all.

    open_clip:ViT-B-16-SigLIP2-256:/path/weights.safetensors     name (or name@tag) and file, or a folder with open_clip_config.json
    timm:vit_small_patch14_dinov2.lvd142m:/path/weights.pth      name and file
    hf:/folder                                                   SigLIP, SigLIP 2, CLIP, DINOv2, DINOv3

`random` in place of a path builds the tower untrained. Nothing is ever downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which tower, and where its weights are."""

    library: Literal["open_clip", "timm", "hf"]
    name: str
    """Architecture as the library calls it, or a folder that says."""
    weights: Path | None
    """File, or the folder itself where `name` is one. None builds it untrained."""

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


def parse(text: str) -> Source:
    """`library:name:weights` → Source, checked as far as can be without building anything."""
    library, _, rest = text.partition(":")
    if library not in ("open_clip", "timm", "hf") or not rest:
        raise ValueError(f"{text!r} names no tower: write open_clip:NAME:WEIGHTS, timm:NAME:WEIGHTS or hf:FOLDER, "
                         "with `random` for WEIGHTS to build it untrained")
    name, _, where = rest.rpartition(":")
    if (library == "hf" and where != "random") or (not name and Path(rest).is_dir()):
        name = where = rest
    if not name:
        raise ValueError(f"{text!r} does not say where the weights are: write {library}:{rest}:PATH, or {library}:{rest}:random "
                         "for an untrained tower; nothing is downloaded")
    if library == "hf" and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} is no Hugging Face folder: it has no config.json. Write hf:FOLDER")
    weights = None if where == "random" else Path(where)
    if weights and not weights.exists():
        raise FileNotFoundError(f"weights {weights} of tower {library}:{name} do not exist: give their path; nothing is downloaded")
    return Source(library=library, name=name, weights=weights)


def weights_in(folder: Path) -> Path:
    """The weight file of a folder, or the index of its files."""
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, open_clip_model.safetensors, …): download it whole")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors or torch file, unwrapped. Errors: ValueError that names the file."""
    try:
        weights: dict[str, Any] = (safetensors.torch.load_file(path) if path.suffix == ".safetensors"
                                   else torch.load(path, "cpu", weights_only=True))
        weights = next((weights[key] for key in ("state_dict", "model") if isinstance(weights.get(key), dict)), weights)
        return {name.removeprefix("module."): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # safetensors and pickle raise classes of their own, over several lines
        raise ValueError(f"{path} is no state dict in .safetensors or torch form ({type(error).__name__}): give a file that holds "
                         "tensors only") from error


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load all of `weights` into all of `model`. Errors: ValueError, one line, that says what does not fit."""
    wanted = model.state_dict()
    missing, extra = [k for k in wanted if k not in weights], [k for k in weights if k not in wanted]
    other = [k for k in wanted if k in weights and weights[k].shape != wanted[k].shape]
    if missing or extra or other:
        shapes = f" ({list(weights[other[0]].shape)}, not {list(wanted[other[0]].shape)})" if other else ""
        faults = [f"{len(names)} {what}, such as {names[0]}{more}" for names, what, more in
                  ((missing, "missing", ""), (extra, "unknown", ""), (other, "of another shape", shapes)) if names]
        raise ValueError(f"{path} does not hold the weights of {name}, which has {len(wanted)} tensors: {'; '.join(faults)}. "
                         "Name the model that they were saved from")
    model.load_state_dict(dict(weights))
