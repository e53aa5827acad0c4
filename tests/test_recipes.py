"""Every recipe can be built and printed anywhere: no network, no GPU, and nothing that cannot work but paths that are the user's."""

import runpy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from mmllm import config
from mmllm.cli import RECIPES
from mmllm.config import Pretrain
from mmllm.runs import tokenizer_recipe
from mmllm.runs.quickstart import Quickstart, pretrain_recipe
from mmllm.runs.tokenizer_recipe import TrainTokenizer, TrainVisual
from tokenizer.model import VisualTokenizer

FILES = sorted(path for path in RECIPES.glob("*.py") if path.stem != "__init__")
USERS = ("perceptual_weights", "init_rows")
"""Files that a user has to give, which are checked for being there."""


def recipe(path: Path) -> Any:
    return runpy.run_path(str(path))["RECIPE"]


def violations(recipe: Any) -> list[str]:
    if isinstance(recipe, Quickstart):
        return tokenizer_recipe.violations(recipe.tokenizer) + config.violations(pretrain_recipe(recipe))
    if isinstance(recipe, TrainVisual):
        return tokenizer_recipe.violations(recipe.training)
    return config.violations(recipe) if isinstance(recipe, Pretrain) else []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_recipe_can_work_given_the_paths_of_a_user(path: Path) -> None:
    assert [line for line in violations(recipe(path)) if not any(name in line for name in USERS)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_recipe_is_what_its_command_line_says_it_is(path: Path) -> None:
    made = recipe(path)
    assert is_dataclass(made)
    assert tyro.cli(type(made), default=made, args=[]) == made


@pytest.mark.parametrize("name", ["tokenizer_256", "tokenizer_256_m8", "tokenizer_384"])
def test_a_cluster_recipe_is_a_tokenizer_of_its_stated_size(name: str) -> None:
    """Built without memory for weights, around a tower of our own in place of the pretrained one."""
    training: TrainTokenizer = recipe(RECIPES / f"{name}.py").training
    with torch.device("meta"):
        model = VisualTokenizer(replace(training.model, tower_source=""))
    books, size, codes = {"tokenizer_256": (1, 32_768, [256, 64, 16]), "tokenizer_256_m8": (8, 4_096, [256, 64, 16]),
                          "tokenizer_384": (1, 65_536, [576, 144, 64])}[name]
    assert (model.num_books, model.codebook_size) == (books, size)
    assert [h * w for h, w in model.grids] == codes


def test_a_recipe_that_reaches_for_a_missing_file_says_which() -> None:
    training = recipe(RECIPES / "tokenizer_256.py").training
    (line,) = tokenizer_recipe.violations(training)
    assert str(training.perceptual_weights) in line and "give perceptual_weights" in line


def test_the_stages_of_a_tokenizer_recipe_name_fields_that_differ() -> None:
    """A second stage that freezes codes has nothing to gain from the losses that only codes feel."""
    for path in FILES:
        made = recipe(path)
        if isinstance(made, TrainVisual) and made.training.decode.steps:
            weights = made.training.decode.weights
            assert not any(getattr(weights, name) for name in ("quantize", "entropy", "semantic", "contrastive")), path.stem
            assert {f.name for f in fields(weights)} >= {"l1", "l2", "perceptual"}
