"""Kill a run again and again, at any moment and in the middle of saves, and let it end: a program, so that nothing else is forked.

It imports what the ranks need once, then forks each run from itself, which takes a second instead of ten."""

import ctypes
import gc
import json
import os
import pickle
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import whole_checkpoints

import mmllm.megatron.train  # noqa: F401  what the forked ranks would import each
from mmllm import launch
from mmllm.config import Pretrain
from mmllm.manifest import newest, verify
from mmllm.run import read_metrics

PR_SET_CHILD_SUBREAPER = 36


def start(recipe: Pretrain) -> int:
    """A run in a process of its own, as `mmllm pretrain` starts it. → its process"""
    order = recipe.out.with_suffix(".pickle")
    order.write_bytes(pickle.dumps(recipe))
    sys.stdout.flush()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        words = recipe.out.with_suffix(".words")
        words.unlink(missing_ok=True)
        code = launch.main("toy_rows:train", order, recipe.parallel.ranks, words, parent)
        if code:
            print(words.read_text(), file=sys.stderr)
        os._exit(code)
    return pid


def wait_for_all() -> int:
    """Until every process of the run is gone. → exit status of the last of them to be waited for that was not zero"""
    failed = 0
    while True:
        try:
            _, status = os.wait()
        except ChildProcessError:
            return failed
        failed = status or failed


def kill(pid: int, recipe: Pretrain, in_a_save: bool) -> dict[str, Any]:
    """Wait for the moment, kill, and look at what is left."""
    begin, folder = len(read_metrics(recipe.out)), recipe.out / "checkpoints"
    while len(read_metrics(recipe.out)) in (0, begin):
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "it ended before it was killed: more steps"
        time.sleep(0.005)
    if in_a_save:
        until = time.monotonic() + 5
        while not list(folder.glob("*.tmp")) and time.monotonic() < until:
            pass
        time.sleep(random.random() * 0.02)
    else:
        time.sleep(random.random() * 0.15)
    os.kill(pid, signal.SIGKILL)
    wait_for_all()
    last = newest(folder)
    if last is not None:
        verify(last)
    return {"half_written": bool(list(folder.glob("*.tmp"))), "saved": whole_checkpoints(recipe)}


def main(order: Path, kills: int, found: Path) -> None:
    whole: Pretrain = pickle.loads(order.read_bytes())
    cut = replace(whole, out=whole.out.with_name("cut"))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()
    (cut.out / "checkpoints").mkdir(parents=True)
    start(whole)
    assert wait_for_all() == 0
    seen = [kill(start(cut), cut, in_a_save=bool(number % 2)) for number in range(kills)]
    start(cut)
    assert wait_for_all() == 0
    found.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
