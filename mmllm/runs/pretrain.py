"""Pretrain a decoder on packed rows: check the recipe, start the ranks.

What each rank then does, step after step, is `mmllm.megatron.train`; this module imports nothing heavy, so a wrong
recipe is refused at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from mmllm import launch
from mmllm.config import Pretrain, with_ranks
from mmllm.violations import check


def main(recipe: Pretrain) -> Path:
    """Train to `recipe.steps`; returns the last checkpoint. Under torchrun this process is one rank, else ranks are
    started here."""
    if launch.under_torchrun():
        recipe = with_ranks(recipe, int(os.environ["WORLD_SIZE"]))
        check(recipe)
        from mmllm.megatron.train import train
        train(recipe)
    else:
        check(recipe)
        launch.launch("mmllm.megatron.train:train", recipe, recipe.parallel.ranks)
    checkpoint = recipe.out / "checkpoints" / f"step_{recipe.steps:07d}"
    if not checkpoint.is_dir():
        raise SystemExit(launch.STOPPED)                                              # told to stop, saved, to be continued
    return checkpoint
