"""Folders that are whole or absent: checkpoints `step_XXXXXXX`, each with a list of its files, their sizes and hashes.

A checkpoint is written to `step_XXXXXXX.tmp`, synced, given its list, and renamed: the name without a suffix *is* the promise that it
is whole. A kill at any moment leaves the one before. One that is found broken all the same (a disk, a hand) is set aside under
`.broken` and never loaded again.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mmllm.progress import say
from mmllm.run import write_json

MANIFEST = "manifest.json"
STATE = "state.json"
"""Step, data position, recipe: what a reader needs without any tensor."""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: Path) -> dict[str, Any]:
    """What the list says of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def finish(beside: Path, step: int, files: dict[str, dict[str, Any]], keep_last: int, keep_every: int = 0) -> Path:
    """Sync, list and rename a checkpoint that lies in `step_XXXXXXX.tmp`, then delete all but the last `keep_last` and those of steps
    that are multiples of `keep_every`. → its folder"""
    final = beside.with_suffix("")
    for name in files:
        sync(beside / name)
    write_json(beside / MANIFEST, {"step": step, "files": files})
    sync(beside)
    if final.exists():  # the same step again, after a refused continuation
        delete(final)
    beside.rename(final)
    sync(final.parent)
    for old in whole(final.parent)[:-keep_last]:
        if not keep_every or step_of(old) % keep_every:
            delete(old)
    return final


def delete(checkpoint: Path) -> None:
    """Its name first: half of it must not bear one that promises the whole."""
    going = checkpoint.with_suffix(".deleted")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)


def tidy(folder: Path) -> None:
    """Remove what a killed run left half-written or half-deleted."""
    for suffix in ("tmp", "deleted"):
        for path in folder.glob(f"step_*.{suffix}"):
            shutil.rmtree(path)


def set_aside(checkpoint: Path) -> Path:
    """Keep a broken checkpoint under a name that nobody loads. → where it lies"""
    aside, number = checkpoint.with_suffix(".broken"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_suffix(f".broken-{number}")
    return checkpoint.rename(aside)


def sync(path: Path) -> None:
    """Have the disk hold a file or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def whole(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir() and path.suffix == ""), key=step_of)


def newest(folder: Path) -> Path | None:
    """The last finished checkpoint under a folder."""
    finished = whole(folder)
    return finished[-1] if finished else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Refuse a checkpoint that lacks a file or holds a changed one. `part` of `parts` looks at its share of the files."""
    manifest_path = checkpoint / MANIFEST
    advice = f"delete {checkpoint} to continue from the one before, or restore the file"
    if not manifest_path.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} has no {MANIFEST}: {advice}")
    try:
        listed_files = sorted(json.loads(manifest_path.read_text())["files"].items())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {checkpoint}: its {MANIFEST} cannot be read ({error!r}): {advice}") from error
    for name, listed in listed_files[part::parts]:
        path = checkpoint / name
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {checkpoint} is missing the file {name}: {advice}")
        if entry(path) != listed:
            raise ValueError(f"checkpoint {checkpoint}: the file {name} is not the one that was saved: {advice}")


def find(folder: Path) -> Path | None:
    """The newest checkpoint that is what it was when it was saved; every rank reads a part of the files. Broken ones are set aside, with
    a line. Errors: ValueError where there are checkpoints, all of them broken."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0 and folder.is_dir():
        tidy(folder)
    broken = list[str]()
    while True:
        name = [str(newest(folder) or "")]
        dist.broadcast_object_list(name)  # the first rank's view: file systems may lag
        if not name[0]:
            break
        problem = problem_of(Path(name[0]), rank, ranks)
        if not problem:
            return Path(name[0])
        broken.append(problem)
        if rank == 0:
            say(f"{broken[-1]}: set aside as {set_aside(Path(name[0]))}, the one before is taken")
        dist.barrier()
    if broken:
        raise ValueError(f"{folder} has no checkpoint left to continue from ({'; '.join(broken)}): restore one, or give another `out`")
    return None


def problem_of(checkpoint: Path, rank: int, ranks: int) -> str:
    """Why a checkpoint is not what it was when it was saved, nothing if it is; every rank reads a part of the files."""
    import torch.distributed as dist

    mine = ""
    try:
        verify(checkpoint, rank, ranks)
    except (ValueError, OSError) as error:
        mine = str(error).partition(": delete")[0]
    problems = [mine] * ranks
    dist.all_gather_object(problems, mine)
    return next((problem for problem in problems if problem), "")
