"""Compute a dumped training step again: find the checkpoint before it, start the ranks.

What they do is `mmllm.megatron.replay`; this module imports nothing heavy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmllm.launch import launch
from mmllm.manifest import step_of, verify, whole


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What each rank is told."""

    step: Path
    """A bad_step_*.pt file; those of the other ranks lie beside it."""
    checkpoint: Path
    """Whose weights compute."""
    tp: int
    """Ranks that split them."""
    found: Path
    """Where the first rank writes its list."""


def main(step: Path, checkpoint: Path | None = None, tp: int = 1) -> dict[str, Any]:
    """→ `step`, `checkpoint` and its step, the losses `then`, and `documents`, those that weigh most first."""
    if not step.is_file() or not step.name.startswith("bad_step_"):
        raise FileNotFoundError(f"{step} is no file bad_step_*.pt of a run")
    checkpoint = checkpoint or before(step)
    verify(checkpoint)
    with TemporaryDirectory(prefix="mmllm-replay-") as folder:
        found = Path(folder) / "found.json"
        launch("mmllm.megatron.replay:replay", Replay(step=step.absolute(), checkpoint=checkpoint.absolute(), tp=tp, found=found), tp)
        return {"checkpoint": checkpoint.name, **json.loads(found.read_text())}


def before(step_file: Path) -> Path:
    """The newest checkpoint of the run that is not behind the step."""
    step = int(step_file.name.split("_")[2])
    found = [each for each in whole(step_file.parent / "checkpoints") if step_of(each) <= step]
    if not found:
        raise FileNotFoundError(f"{step_file.parent / 'checkpoints'} has none at or before step {step}: give one with --checkpoint")
    return found[-1]
