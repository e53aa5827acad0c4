"""Train the visual tokenizer: assemble the parts a recipe names, start the codebooks, run the stages, save.

    teacher   a small CLIP trained here, or a pretrained tower
    start     closed-form latents or first latents, k-means of each book, phrases for a text table
    align     everything trains (mmllm/runs/tokenizer_steps.py)
    decode    codes frozen, the pixel decoder trains on

A run that stops goes on from its newest checkpoint and ends with the weights it would have had without the interruption, bit for bit.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from data import shards
from data.images import to_tensor
from data.pairs import Pairs
from mmllm import launch, sharded
from mmllm.manifest import newest, read_state, verify
from mmllm.progress import Progress
from mmllm.run import Log, StopOnSignal, seed_all, write_json
from mmllm.runs.tokenizer_parts import Run, refuse_others
from mmllm.runs.tokenizer_recipe import TrainTokenizer, TrainVisual, check, recipe_hash
from mmllm.runs.tokenizer_steps import run_stage
from mmllm.runs.train_teacher import train_teacher
from tokenizer.contrastive import TextTower
from tokenizer.features import HEAD
from tokenizer.model import VisualTokenizer
from tokenizer.objective import CodeContrast, Objective
from tokenizer.perceptual import Perceptual, edges
from tokenizer.quantize import SharedIndexQuantizer, TextEmbedding
from tokenizer.ranks import rank
from tokenizer.semantic import Teacher
from tokenizer.start import start
from tokenizer.text import TextTokenizer
from tokenizer.towers import Tower


def main(recipe: TrainVisual) -> Path:
    """Train to the last step, unless that is done; under torchrun this process is one rank, else ranks are started here. → `recipe.out`

    Errors: ValueError for a recipe that cannot work, or is not that of the tokenizer in `out`."""
    if launch.under_torchrun():
        recipe = replace(recipe, training=replace(recipe.training, ranks=int(os.environ["WORLD_SIZE"])))
    check(recipe.training)
    if ended(recipe):
        return recipe.out
    if recipe.training.ranks > 1 and not launch.under_torchrun():
        launch.launch("mmllm.runs.train_tokenizer:train", recipe, recipe.training.ranks)
    else:
        train(recipe)
    if not ended(recipe):
        raise SystemExit(launch.STOPPED)  # told to stop, saved, to be continued
    return recipe.out


def ended(recipe: TrainVisual) -> bool:
    """`out` holds this recipe's tokenizer, whole. Errors: ValueError where it holds another's."""
    if not (recipe.out / "config.json").is_file():  # written last
        return False
    path, now = recipe.run / "recipe.json", recipe_hash(recipe.training)
    then = json.loads(path.read_text()).get("hash") if path.is_file() else None
    if then != now:
        raise ValueError(f"{recipe.out} holds a tokenizer of recipe {then or 'unknown'}, this is recipe {now} (`hash` in {path}): choose "
                         "another out, or remove both folders")
    return True


def train(recipe: TrainVisual) -> None:
    """One rank."""
    training = recipe.training
    if training.ranks > 1:
        launch.join()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    text = TextTokenizer.load(recipe.text)
    pairs = Pairs(shards.find(recipe.raw, "train-"), training.model.sizes, recipe.run / "index")
    held = Pairs(shards.find(recipe.raw, "seen-"), training.model.sizes, recipe.run / "index")
    own = make_teacher(recipe, pairs, text) if training.teacher.steps else None
    seed_all(training.seed)
    objective = assemble(training, own, text, pairs).to(device)
    resumed = newest(recipe.run / "checkpoints")
    if resumed is None:
        start_books(training, objective.tokenizer, text, pairs, device)
    else:
        verify(resumed)
        refuse_others(resumed, training, objective.tokenizer)
    at, step = ("", 0) if resumed is None else (read_state(resumed)[name] for name in ("stage", "step"))
    stages = [(name, stage) for name, stage in (("align", training.align), ("decode", training.decode)) if stage.steps]
    total, before = sum(stage.steps for _, stage in stages), 0
    if rank() == 0:
        write_json(recipe.run / "recipe.json", {"hash": recipe_hash(training), **asdict(recipe)})
    opened = Log(recipe.run, total, after_step=step, title="tokenizer") if rank() == 0 else nullcontext()
    with StopOnSignal() as stop, opened as log:
        for name, stage in stages:
            if name == at or step < before + stage.steps:  # a stage that was saved at its last step still hands its weights on
                run = Run(training, name, stage, objective, pairs, held, recipe.run / "checkpoints", before, total, device)
                if not run_stage(run, step, resumed if name == at else None, stop, log):
                    return
            before += stage.steps
    save(recipe, objective)
    if training.ranks > 1:
        torch.distributed.barrier()  # no rank looks for what the first has not yet written


def make_teacher(recipe: TrainVisual, pairs: Pairs, text: TextTokenizer) -> Teacher:
    """The small CLIP: as it was saved, or trained by the first rank now."""
    if rank() == 0 and not recipe.teacher.is_file():
        with Progress("teacher", "steps") as progress:
            training = recipe.training
            train_teacher(pairs, text, training.model.tower, training.teacher, training.seed, progress).save(recipe.teacher)
    if recipe.training.ranks > 1:
        torch.distributed.barrier()
    return Teacher.load(recipe.teacher)


def assemble(training: TrainTokenizer, own: Teacher | None, text: TextTokenizer, pairs: Pairs) -> Objective:
    """Tokenizer, teacher, text tower and perceptual loss as the recipe names them. Errors: one line, before any step."""
    config = training.model
    needs_text = config.quantizer.kind == "shared" and config.quantizer.semantic_table == "text"
    model = VisualTokenizer(config, text_embedding(training, own, text, pairs) if needs_text else None)
    if own is not None:
        model.semantic_tower.load_state_dict(own.visual.state_dict())
    teacher: nn.Module | None = None
    if training.teacher_source:
        teacher = Tower.load(training.teacher_source)
        teacher.expect(config.teacher_width or model.tower_width, "model.teacher_width")
    elif config.train_tower:  # as it was before training
        teacher = own.visual if own is not None else model.frozen_tower()
    stages = [stage for stage in (training.align, training.decode) if stage.steps]
    contrast = None
    if any(stage.weights.contrastive for stage in stages):
        tower = TextTower.load(training.text_tower) if training.text_tower else TextTower.small(config.tower, text.size, text.encode)
        contrast = CodeContrast(model.quantizer.part_dims[0], tower, training.contrast)
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    if training.perceptual != "none" and any(stage.weights.perceptual for stage in stages):
        perceptual = edges if training.perceptual == "edges" else Perceptual.load(training.perceptual, training.perceptual_weights)
    return Objective(model, teacher, contrast, perceptual)


def text_embedding(training: TrainTokenizer, own: Teacher | None, text: TextTokenizer, pairs: Pairs) -> TextEmbedding:
    """What a text table is made of: rows of a language model's input embedding, or those of the small CLIP that its captions use."""
    if training.text_rows is not None:
        from tokenizer.text_rows import read, select

        rows = select(read(training.text_rows), training.model.quantizer.codebook_size, training.text_selection, training.seed)
        embedding, ids, checksum = rows.embedding, rows.ids, rows.checksum
    else:
        assert own is not None
        ids = usable_rows(text.encode_all(pairs.texts), text.size)
        embedding, checksum = own.text.token_embedding.weight[ids].detach(), ""  # pyright: ignore[reportIndexIssue]
    embedding = embedding - embedding.mean(0)
    return TextEmbedding(embedding / embedding.norm(dim=-1).mean(), ids, embedding.shape[1], checksum)


def usable_rows(texts: Sequence[Sequence[int]], size: int) -> Tensor:
    """Ids of the text pieces that occur, and not in nearly every text: the rows of the token embedding that mean something. [V]"""
    count = torch.zeros(size)
    for ids in texts:
        count[list(set(ids))] += 1
    return ((count > 0) & (count < 0.9 * len(texts))).nonzero().squeeze(-1)


def start_books(training: TrainTokenizer, model: VisualTokenizer, text: TextTokenizer, pairs: Pairs, device: torch.device) -> None:
    """Codebooks from about `start.patches` positions of pictures, shared out among the ranks."""
    if not training.start.patches:
        return
    grid = model.grid[0] * model.grid[1]
    group = np.flatnonzero(pairs.groups == np.bincount(pairs.groups).argmax())  # pictures of one size
    sample = np.random.default_rng(training.seed).permutation(group)[:max(training.ranks, training.start.patches // grid)]
    batch = pairs.batch(sample[rank()::training.ranks])
    said = None
    if model.text is not None and training.text_rows is None:
        ids = model.text.ids
        place, said = {int(row): column for column, row in enumerate(ids)}, torch.zeros(len(batch.texts), len(ids))
        for line, words in zip(said, text.encode_all(batch.texts), strict=True):
            line[[place[i] for i in words if i in place]] = 1
        said = said.to(device)
    start(model, to_tensor(batch.pictures).to(device), said, training.start.rounds, training.seed)


def save(recipe: TrainVisual, objective: Objective) -> None:
    """The tokenizer, written by the first rank; beside it, and before, the head and text tower of a contrastive loss."""
    model = objective.tokenizer
    if isinstance(model.quantizer, SharedIndexQuantizer):
        model.quantizer.freeze()
    weights = sharded.gathered(objective.state_dict())
    if rank() != 0:
        return
    recipe.out.mkdir(parents=True, exist_ok=True)
    if objective.contrast is not None:
        head = {name.removeprefix("contrast."): value.contiguous() for name, value in weights.items() if name.startswith("contrast.")}
        safetensors.torch.save_file(head, recipe.out / HEAD, {"text_tower": recipe.training.text_tower})
        shutil.copyfile(recipe.text, recipe.out / "text.model")
    whole = VisualTokenizer(model.config, model.text)
    whole.load_state_dict({name.removeprefix("tokenizer."): value for name, value in weights.items() if name.startswith("tokenizer.")})
    whole.eval().requires_grad_(False).save(recipe.out)
