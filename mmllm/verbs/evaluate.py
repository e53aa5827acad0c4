"""Verbs that measure models: `mmllm eval`, `mmllm eval compare`."""

from dataclasses import dataclass
from pathlib import Path

from mmllm.evaluate.settings import Evaluation
from mmllm.progress import say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Evaluate(Evaluation):
    """Measure a model folder on raw shards, each number with its interval: eval.json and eval.html. Goes on where it was interrupted."""

    model: Path
    """Model folder."""
    shards: Path | None = None
    """Folder of raw shards; not needed for text and geneval."""
    out: Path
    """Folder to write: one for each model."""


def evaluate(args: Evaluate) -> None:
    from contextlib import ExitStack

    from mmllm.evaluate.model import evaluate as measure
    from mmllm.progress import Progress

    with ExitStack() as stack:
        bars: dict[str, Progress] = {}

        def tell(task: str, done: int, whole: int) -> None:
            if task not in bars:
                stack.close()
                bars[task] = stack.enter_context(Progress(task, "units"))
            bars[task](done, whole)

        record = measure(args.model, args.shards, args.out, args, tell)
    for name in (name for name in record["tasks"] if name in args.tasks):
        task = record["tasks"][name]
        for what, score in task["scores"].items():
            say(f"{name}: {what}: {score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}], {score['units']:,} units")
        for what, why in task["missing"].items():
            say(f"{name}: {what}: not measured, {why}")
    say(f"page: {args.out / 'eval.html'}")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare evaluations with the first of them: a page, with intervals of the differences."""

    runs: tuple[Path, ...]
    """Folders that `mmllm eval` wrote, two or more."""
    out: Path = Path("comparison.html")
    """Page to write; the numbers go beside it as .json."""
    resamples: int = 2_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the resamples."""


def compare(args: Compare) -> None:
    from mmllm.evaluate.compare import compare as measure

    found = measure(args.runs, args.out, args.resamples, args.seed)
    for task, rows in found["differences"].items():
        for what, some in rows.items():
            for run, one in zip(args.runs[1:], some, strict=True):
                if one is not None and (one["low"] > 0 or one["high"] < 0):
                    say(f"{run} differs: {task}: {what}: {one['value']:+.4g} [{one['low']:+.4g}, {one['high']:+.4g}]")
    say(f"page: {args.out}")


VERBS = {
    "eval": Verb(Evaluate, evaluate, ("model", "shards")),
    "eval compare": Verb(Compare, compare, ("runs",)),
}
