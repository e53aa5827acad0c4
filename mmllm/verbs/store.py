"""Verbs that let others read our shards: `mmllm data nv-meta`."""

from dataclasses import dataclass
from pathlib import Path

from mmllm.progress import say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class NvMeta:
    """Index raw shards for Energon: .nv-meta beside them, the shards stay as they are."""

    raw: Path
    """Folder of raw shards."""
    train: str = "train-"
    """How the names of the shards begin that Energon's `train` split reads."""
    val: str = "val-"
    """The same of `val`; every other set of shards is a split of its own name."""
    test: str = "test-"
    """The same of `test`."""


def data_nv_meta(args: NvMeta) -> None:
    from data import energon
    from mmllm.progress import Progress

    with Progress("indexing", "shards") as progress:
        meta = energon.write(args.raw, {"train": args.train, "val": args.val, "test": args.test},
                             lambda done, total: progress(done, total, {}))
    say(f"{meta} for megatron-energon {energon.ENERGON}")


VERBS = {"data nv-meta": Verb(NvMeta, data_nv_meta, ("raw",))}
