"""What ranks run that start from the weights of another model."""

import json
from dataclasses import replace

from toy_rows import ToyRows

from data.vocab import Vocab
from mmllm.config import Parallel, Pretrain


def losses_from(job: tuple[Pretrain, dict[str, Parallel]]) -> None:
    """A few steps from `recipe.init` under each layout; the first rank writes {name: [a loss a step]} to `recipe.out`."""
    recipe, layouts = job
    from mmllm.megatron import optim, parallel, warm
    from mmllm.megatron.batch import micro_batches
    from mmllm.megatron.model import build
    from mmllm.megatron.step import forward_backward
    assert recipe.init is not None
    rows, found = ToyRows(vocab=Vocab.load(recipe.init / "vocab.json")), dict[str, list[float]]()
    for number, (name, widths) in enumerate(layouts.items()):
        here = replace(recipe, parallel=widths, seed=number)                   # other new weights: init's must win
        layout = parallel.split_again(widths, 0) if number else parallel.start(widths, 0)
        model = optim.wrap(build(here, layout, rows.vocab.size))
        optimizer = optim.make(here, model)
        warm.start(recipe.init, rows.vocab, model, optimizer, layout)
        found[name] = []
        for step in range(recipe.steps):
            optim.set_lr(optimizer, step, here)
            each = here.global_batch // layout.dp
            first = step * here.global_batch + layout.dp_rank * each
            mine = [rows.row(n) for n in range(first, first + each)]
            found[name].append(forward_backward(model, micro_batches(mine, rows.vocab, here, layout), layout)["loss"])
            optimizer.step()
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
        if layout.rank == 0:
            recipe.out.mkdir(parents=True, exist_ok=True)
            (recipe.out / f"losses_{layout.ranks}.json").write_text(json.dumps(found))
    parallel.stop()
