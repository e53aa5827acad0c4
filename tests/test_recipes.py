"""Every recipe can be built and printed anywhere: no network, no GPU, and nothing that cannot work but paths that are the user's."""

import re
import runpy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from data.vocab import Vocab
from mmllm import violations
from mmllm.cli import RECIPES
from mmllm.config import Pretrain
from mmllm.hf_config import read_model
from mmllm.plan import parameters, report
from mmllm.plan.hardware import gpu_of
from mmllm.plan.recipe import Given, job_of
from mmllm.runs import sft_recipe, tokenizer_recipe
from mmllm.runs.quickstart import Quickstart, pretrain_recipe
from mmllm.runs.sft_recipe import Sft
from mmllm.runs.tokenizer_recipe import TrainTokenizer, TrainVisual
from tokenizer.model import VisualTokenizer

FILES = sorted(path for path in RECIPES.glob("*.py") if path.stem != "__init__")
USERS = ("perceptual_weights", "init_rows", "init: ")
"""Files that a user has to give, which are checked for being there."""


def recipe(path: Path) -> Any:
    return runpy.run_path(str(path))["RECIPE"]


def wrong_with(recipe: Any) -> list[str]:
    if isinstance(recipe, Quickstart):
        return tokenizer_recipe.violations(recipe.tokenizer) + violations.violations(pretrain_recipe(recipe))
    if isinstance(recipe, TrainVisual):
        return tokenizer_recipe.violations(recipe.training)
    if isinstance(recipe, Sft):
        return sft_recipe.violations(recipe)
    assert isinstance(recipe, Pretrain)
    return violations.violations(recipe)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_recipe_can_work_given_the_paths_of_a_user(path: Path) -> None:
    assert [line for line in wrong_with(recipe(path)) if not any(name in line for name in USERS)] == []


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


CLUSTER = {"pretrain_1b": 1.38e9, "pretrain_8b_fp8": 7.75e9, "pretrain_70b_fp8": 70.1e9, "continue_qwen3_8b": 8.46e9, "sft_8b": 8.46e9,
           "sft_8b_lora": 8.46e9}
"""Recipes of language models for a cluster, and their weights."""


@pytest.mark.parametrize("name", CLUSTER)
def test_a_cluster_recipe_fits_its_gpus_and_costs_what_it_says(name: str) -> None:
    path = RECIPES / f"{name}.py"
    job = job_of(recipe(path), Given(decoder=recipe(RECIPES / "continue_qwen3_8b.py")))
    assert parameters.whole(job.model, job.vocab).total == pytest.approx(CLUSTER[name], rel=5e-3)
    found = report.plan(name, recipe(path), job, gpu_of("h100"))
    assert found["memory"]["total"] < 0.9 * found["memory"]["available"], "room for what is not counted"
    said = re.search(r"Planned, not measured: ([\d,]+) GPU hours, ([\d.]+) days", path.read_text())
    assert said is not None
    assert float(said[1].replace(",", "")) == pytest.approx(found["run"]["gpu_hours"], rel=0.05)
    assert float(said[2]) == pytest.approx(found["run"]["seconds"] / 86_400, rel=0.05)


def test_a_cluster_recipe_names_the_vocabulary_of_its_tokenizers() -> None:
    """256 px of tokenizer_256 behind the text's own ids: the base's 151,936 rows, or 65,536 pieces."""
    visual = recipe(RECIPES / "tokenizer_256.py").training.model
    with torch.device("meta"):
        model = VisualTokenizer(replace(visual, tower_source=""))
    for name, text in (("pretrain_1b", 65_536), ("pretrain_70b_fp8", 65_536), ("continue_qwen3_8b", 151_936)):
        vocab = Vocab(text_size=text, codebook_size=model.codebook_size, num_books=model.num_books, grids=tuple(model.grids))
        assert recipe(RECIPES / f"{name}.py").vocab_size == vocab.size


def test_the_warm_start_has_the_shape_of_its_base() -> None:
    """config.json of huggingface.co/Qwen/Qwen3-8B."""
    base = {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12_288, "max_position_embeddings": 40_960,
            "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1_000_000, "sliding_window": None, "tie_word_embeddings": False,
            "use_cache": True, "use_sliding_window": False, "vocab_size": 151_936}
    assert read_model(base) == recipe(RECIPES / "continue_qwen3_8b.py").model
