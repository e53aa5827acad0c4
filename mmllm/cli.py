"""`mmllm VERB …`: finds the verb and the recipe, and turns words into a dataclass whose docstrings are the help.

Verbs that run a recipe are here; the others are in mmllm/verbs/.

What is wrong with the input is one line and exit code 2; `--debug`, before or behind the verb, shows the traceback.
Heavy imports wait until a verb needs them.
"""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.launch import DEBUG_VARIABLE, FORESEEN, USER_ERROR, RankFailed
from mmllm.progress import say
from mmllm.verbs import convert, curate, data, evaluate, inspect, model, replay, serve, store, tokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
LEVELS = {"2": "quickstart_level2", "3": "quickstart_level3"}


def recipe_of(name: str, kind: type) -> Any:
    """RECIPE of a Python file, named by path or as a file of recipes/."""
    path = Path(name) if name.endswith(".py") else RECIPES / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.py") if p.stem != "__init__"))
        raise FileNotFoundError(f"there is no recipe {name}: give a .py file, or one of {known}")
    recipe = runpy.run_path(str(path)).get("RECIPE")
    if not isinstance(recipe, kind):
        raise ValueError(f"{path} holds no RECIPE of type {kind.__name__}, which this command runs")
    return recipe


def _with_recipe(words: list[str], verb: str, kind: type, default: str | None = None) -> Any:
    """`RECIPE --field value …` → the recipe with those fields."""
    import tyro

    if words and not words[0].startswith("-"):
        name, *words = words
    elif default is not None:
        name = default
    elif words and words[0] in ("-h", "--help"):
        tyro.cli(kind, args=words, prog=f"mmllm {verb} RECIPE")
        raise SystemExit(0)
    else:
        raise ValueError(f"mmllm {verb} needs a recipe: a .py file, or a name in recipes/")
    return tyro.cli(kind, default=recipe_of(name, kind), args=words, prog=f"mmllm {verb} {name}")


def quickstart(words: list[str]) -> None:
    """The whole pipeline on this machine; ends with a report to look at. --fast, --level 1|2|3 and --data choose the recipe."""
    from mmllm.runs.quickstart import Quickstart, main

    name = "quickstart"
    for number, word in enumerate(words):
        if word == "--fast":
            name = "quickstart_fast"
        elif word == "--data" or word.startswith("--data="):
            name = "quickstart_pictures"
        elif word.startswith("--level="):
            name = LEVELS.get(word.partition("=")[2], name)
        elif word == "--level" and number + 1 < len(words):
            name = LEVELS.get(words[number + 1], name)
    words = [word for word in words if word != "--fast"]
    main(_with_recipe(words, "quickstart", Quickstart, name))


def pretrain(words: list[str]) -> None:
    """Pretrain a decoder on token shards with megatron-core: RECIPE --field value …"""
    from mmllm.config import Pretrain
    from mmllm.runs.pretrain import main

    say(f"last checkpoint: {main(_with_recipe(words, 'pretrain', Pretrain))}")


def sft(words: list[str]) -> None:
    """Instruction tuning of a model folder with DeepSpeed: RECIPE --field value …"""
    from mmllm.runs.sft import Sft, main

    say(f"tuned model: {main(_with_recipe(words, 'sft', Sft))}")


def plan(words: list[str]) -> None:
    """Memory, step time and days of a recipe on a cluster, and its launch files: RECIPE [--gpus N] [--hardware h100] …"""
    from mmllm.verbs.plan import main

    main(words, recipe_of)


def tokenizer_train(words: list[str]) -> None:
    """Train teacher and visual tokenizer on the pairs of raw shards: RECIPE --field value …"""
    from mmllm.runs.tokenizer_recipe import TrainVisual
    from mmllm.runs.train_tokenizer import main

    say(f"visual tokenizer: {main(_with_recipe(words, 'tokenizer train', TrainVisual))}")


VERBS = {**data.VERBS, **convert.VERBS, **inspect.VERBS, **curate.VERBS, **store.VERBS, **tokenizer.VERBS, **model.VERBS,
         **serve.VERBS, **evaluate.VERBS, **replay.VERBS}
RECIPE_VERBS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart, "tokenizer train": tokenizer_train, "pretrain": pretrain, "sft": sft, "plan": plan}


def usage() -> str:
    lines = ["mmllm: a language model that sees and draws, from raw shards to chat", "", "  mmllm VERB --help", ""]
    lines += [f"  {verb:<22}{(run.__doc__ or '').splitlines()[0]}" for verb, run in RECIPE_VERBS.items()]
    lines += [f"  {verb:<22}{(found.arguments.__doc__ or '').splitlines()[0]}" for verb, found in VERBS.items()]
    return "\n".join(lines)


def run(words: list[str]) -> None:
    """Run one command line, without the program's name."""
    if not words or words[0] in ("-h", "--help"):
        say(usage())
        return
    for count in (2, 1):
        verb, rest = " ".join(words[:count]), words[count:]
        if verb in RECIPE_VERBS:
            RECIPE_VERBS[verb](rest)
            return
        if verb in VERBS:
            import tyro

            found = VERBS[verb]
            found.run(tyro.cli(found.arguments, args=_named(rest, found.positional), prog=f"mmllm {verb}"))
            return
    raise ValueError(f"there is no verb {' '.join(words[:2])!r}; `mmllm --help` lists them")


def _named(words: list[str], names: tuple[str, ...]) -> list[str]:
    """Leading plain words become the named fields."""
    out = list[str]()
    rest = list(words)
    for name in names:
        if not rest or rest[0].startswith("-"):
            break
        out += [f"--{name}", rest.pop(0)]
    return out + rest


def main() -> None:
    words = sys.argv[1:]
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        run(words)
    except (*FORESEEN, RankFailed) as error:
        if debug:
            raise
        print(f"mmllm: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR if isinstance(error, ValueError | FileNotFoundError) else 1) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
