"""What an evaluation is asked for: no library is imported here, so the command line knows it at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VisualEvaluation:
    """What a visual tokenizer is measured with. What has no weights is not measured, and the report says so."""

    inception: Path | None = None
    """Weights of the FID Inception network (torch-fidelity's file): rfid, pfid."""
    clip_name: str | None = None
    """An open_clip model such as ViT-B-16 or ViT-L-14@openai: fid_clip:NAME, pfid_clip:NAME, zero-shot accuracy."""
    clip_weights: Path | None = None
    """Its checkpoint, or the folder that holds it."""
    lpips: Path | None = None
    """Weights of the LPIPS backbone (torchvision's state dict)."""
    lpips_backbone: Literal["alex", "vgg"] = "alex"
    """Which network they are of; the score is lpips_NAME."""
    font: Path | None = None
    """TrueType font of the words that are read back; none is PIL's own."""
    limit: int | None = None
    """Pictures to measure, spread evenly over the source; none is all."""
    prefix: str | None = None
    """Tars whose names start so; none is seen-* where there are any, else all."""
    label: str = "meta.label"
    """Where KEY.json names a picture's class, keys joined by dots. KEY.cls and sub-folders of a folder name classes too."""
    batch: int = 64
    """Pictures at once."""
    seed: int = 0
    """Of the perturbation and of the words."""
    device: str | None = None
    """cpu, cuda, …; none is cuda where there is one."""

    def __post_init__(self) -> None:
        if (self.clip_name is None) != (self.clip_weights is None):
            raise ValueError(f"clip_name is {self.clip_name} and clip_weights {self.clip_weights}: give both --clip-name and "
                             "--clip-weights, or neither")
        for name, value in (("limit", self.limit), ("batch", self.batch)):
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value}: a covariance needs 2 pictures or more")
