"""From a recipe to what is planned of it, on so many GPUs.

What a recipe does not say comes from `Given`: the size of the vocabulary where its shards are not at hand, how long documents are, and
for instruction tuning the decoder of a model folder that is elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from data.index import read_manifest
from data.vocab import Vocab
from mmllm.config import Model, Parallel, Pretrain, batch_at, rows_before, with_ranks
from mmllm.hf_config import read_model
from mmllm.plan.job import Job
from mmllm.runs import sft_recipe
from mmllm.runs.sft_recipe import Sft
from mmllm.violations import violations


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a plan is told besides the recipe."""

    vocab_size: int | None = None
    """Ids of text, control tokens and image codes; None asks the recipe, then its shards."""
    attended: float | None = None
    """Tokens of the document that a token belongs to, averaged over tokens; None takes rows of one document, the dearest case."""
    trained: float = 1.0
    """Share of tokens whose prediction is trained on."""
    decoder: Pretrain | None = None
    """The recipe that made what an instruction tuning starts from, where its model folder is not at hand."""


def job_of(recipe: Pretrain | Sft, given: Given) -> Job:
    """Errors: ValueError where something is not known."""
    return _of_pretrain(recipe, given) if isinstance(recipe, Pretrain) else _of_sft(recipe, given)


def _of_pretrain(recipe: Pretrain, given: Given) -> Job:
    size = given.vocab_size or recipe.vocab_size or _in_shards(recipe)
    rows = max(batch_at(recipe, step) for step in (0, *(first for first, _ in recipe.batch_ramp)))
    return Job(
        model=recipe.model, parallel=recipe.parallel, vocab=recipe.model.vocab_rows(size), row_len=recipe.data.row_len,
        global_batch=rows, micro_batch=recipe.micro_batch, steps=recipe.steps,
        tokens_in_all=rows_before(recipe, recipe.steps) * recipe.data.row_len, precision="fp32" if recipe.precision == "fp32" else "bf16",
        fp8=recipe.fp8, attended=given.attended, trained=given.trained)


def _in_shards(recipe: Pretrain) -> int:
    source = recipe.data.mixtures[0].sources[0].shards
    try:
        return Vocab.of(read_manifest(source)["vocab"]).size
    except FileNotFoundError as error:
        raise ValueError("the size of the vocabulary is not known: the recipe has no vocab_size and its shards, "
                         f"{source}, no manifest: give --vocab-size") from error


def _of_sft(recipe: Sft, given: Given) -> Job:
    model, size = _decoder(recipe.init, given)
    lora = recipe.lora
    rows = {"none": 0, "ours": size - _text_rows(recipe.init), "all": size}[lora.rows] if lora.rank else 0
    return Job(
        model=model, parallel=Parallel(ranks=recipe.ranks, recompute="full" if recipe.gradient_checkpointing else "none"), vocab=size,
        row_len=recipe.data.row_len, global_batch=recipe.global_batch, micro_batch=recipe.micro, steps=recipe.steps,
        tokens_in_all=recipe.steps * recipe.global_batch * recipe.data.row_len, precision="fp32" if recipe.precision == "fp32" else "bf16",
        zero=recipe.zero_stage, gradient_bytes=4 if recipe.precision == "fp32" else 2, attended=given.attended, trained=given.trained,
        lora_rank=lora.rank, lora_targets=lora.targets, lora_rows=rows, offload=recipe.offload, eager=True)


def _text_rows(folder: Path) -> int:
    """Ids of text in a model folder; none where it is elsewhere, so that all rows train, the dearest case."""
    return Vocab.load(folder / "vocab.json").text_size if (folder / "vocab.json").is_file() else 0


def _decoder(folder: Path, given: Given) -> tuple[Model, int]:
    """Shape and vocabulary of a model folder, without its weights."""
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        return read_model(config), config["vocab_size"]
    if given.decoder is None:
        raise ValueError(f"there is no model folder {folder} to read the decoder's shape from: give --decoder RECIPE, that which makes it")
    size = given.vocab_size or given.decoder.vocab_size
    if size is None:
        raise ValueError("the size of the vocabulary is not known: the recipe of --decoder has no vocab_size: give --vocab-size")
    return given.decoder.model, size


def on(recipe: Pretrain | Sft, gpus: int) -> Pretrain | Sft:
    """The recipe on another number of GPUs."""
    return with_ranks(recipe, gpus) if isinstance(recipe, Pretrain) else replace(recipe, ranks=gpus)


def wrong_with(recipe: Pretrain | Sft) -> list[str]:
    """What cannot work in the layout, a line each; files that are elsewhere are not looked for."""
    if isinstance(recipe, Pretrain):
        return [line for line in violations(recipe) if not line.startswith(("init: ", "init_rows: "))]
    return sft_recipe.violations(recipe)
