"""The loss on rows that are not trained on, always the same ones, between two steps that do not notice."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel

from data.loader import Loader
from mmllm.config import Pretrain
from mmllm.megatron.batch import Rows, micro_batches
from mmllm.megatron.parallel import Layout
from mmllm.megatron.step import forward_backward


def held_out(recipe: Pretrain, loader: Loader) -> Loader:
    """Where the rows come from: `validation`, or the shards of `data` named for it; encoded by the tokenizers of the training data."""
    return Loader(recipe.validation or recipe.data.held_out(recipe.validation_prefix), loader.fingerprint)


@torch.no_grad()
def validate(model: list[DistributedDataParallel], held: Rows, recipe: Pretrain, layout: Layout) -> dict[str, float]:
    """Losses by modality over rows 0 … `validation_rows`, over all ranks. Gradients, generators and the place in the training data stay
    as they are."""
    each = recipe.validation_rows // layout.dp
    rows = [held.row(layout.dp_rank * each + n) for n in range(each)]
    for chunk in model:
        chunk.eval()
    losses = forward_backward(model, micro_batches(rows, held.vocab, recipe, layout), layout)
    for chunk in model:
        chunk.train()
    return {f"validation/{name}": value for name, value in losses.items() if name.startswith("loss")}
