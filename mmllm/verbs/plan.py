"""`mmllm plan`: what a recipe costs on a cluster, and the files that start it there."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.plan.launch import Site
from mmllm.progress import say


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory, step time and days of a recipe on a cluster; launch files. Fields of the recipe may be changed as in its own command."""

    gpus: int | None = None
    """GPUs in all; None for the recipe's ranks."""
    hardware: str = "h100"
    """Which: a100, h100, h200, b200, gb200 or b300."""
    vocab_size: int | None = None
    """Ids of text, control tokens and image codes; None asks the recipe, then its shards."""
    attended: float | None = None
    """Tokens of the document that a token belongs to, averaged over tokens; None takes rows of one document, the dearest case."""
    trained: float = 1.0
    """Share of tokens whose prediction is trained on."""
    decoder: str | None = None
    """For sft: the pretraining recipe of the model it starts from, where its folder is not at hand."""
    json: bool = False
    """Print the plan as JSON."""
    write: Path | None = None
    """Folder for torchrun.sh, slurm.sh and kubernetes.yaml."""
    site: Site = field(default_factory=Site)
    """For the launch files."""


def main(words: list[str], recipe_of: Callable[[str, type], Any]) -> None:
    """RECIPE, options of the plan and fields of the recipe. Errors: ValueError for what cannot work or will not fit."""
    import tyro

    from mmllm.config import Pretrain
    from mmllm.plan import launch, memory, recipe, report, search
    from mmllm.plan.hardware import GIB, gpu_of
    from mmllm.runs.sft_recipe import Sft

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            tyro.cli(Plan, args=words, prog="mmllm plan RECIPE")
        raise ValueError("mmllm plan needs a recipe: a .py file, or a name in recipes/")
    name, *rest = words
    args, fields = tyro.cli(Plan, args=rest, prog=f"mmllm plan {name}", return_unknown_args=True)
    found = recipe_of(name, object)
    if not isinstance(found, Pretrain | Sft):
        raise ValueError(f"{name} is a recipe of {type(found).__name__}: a plan is made for pretrain and sft")
    made: Pretrain | Sft = tyro.cli(type(found), default=found, args=fields, prog=f"mmllm plan {name}")
    made = recipe.on(made, args.gpus) if args.gpus is not None else made
    gpu = gpu_of(args.hardware)
    given = recipe.Given(vocab_size=args.vocab_size, attended=args.attended, trained=args.trained,
                         decoder=recipe_of(args.decoder, Pretrain) if args.decoder else None)

    problem = "cannot work:\n" + "\n".join(f"  - {line}" for line in wrong) if (wrong := recipe.wrong_with(made)) else ""
    if not wrong:
        job = recipe.job_of(made, given)
        plan = report.plan(name, made, job, gpu)
        needed = memory.worst(job)
        if needed.total > gpu.memory_bytes:
            problem = (f"will not fit: a rank of stage {needed.stage} needs {needed.total / GIB:.1f} GiB, {gpu.name} has "
                       f"{gpu.memory_bytes / GIB:.1f}")
        if not args.json:
            for line in report.lines(plan):
                say(line)
            best = search.fastest(made, gpu, given)
            if best is not None and best.changes and best.seconds < 0.95 * plan["step"]["seconds"]:
                say(f"faster       {' '.join(best.changes)}: {best.seconds:.2f} s a step")
        else:
            say(json.dumps(plan, indent=1))
    if problem:
        other = search.nearest(made, gpu, given)
        advice = "no layout that was tried does: give more GPUs, or shorter rows" if other is None else (
            f"the nearest that does: {' '.join(other.changes)} ({other.seconds:.2f} s a step)")
        raise ValueError(f"{name} {problem}\n{advice}")
    if args.write is not None:
        ranks = made.parallel.ranks if isinstance(made, Pretrain) else made.ranks
        verb, changed = ("pretrain", ()) if isinstance(made, Pretrain) else ("sft", ("--ranks", str(ranks)))
        job_files = launch.Launch(name=Path(name).stem, verb=verb, words=(name, *fields, *changed), gpus=ranks, gpu=gpu)
        for path in launch.write(args.write, job_files, args.site):
            say(str(path))
