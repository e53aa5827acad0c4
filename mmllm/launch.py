"""Run a function on several processes of this machine, as torchrun does, for a command that starts its own ranks.

Two processes deep: the caller starts *one* fresh Python (`python -m mmllm.launch`), which imports what the ranks need
once and then forks them. Imports are most of a short run's start, so paying them once halves it; and a fresh process
has no threads that a fork could break. If a rank dies the others are ended and the caller gets its last words; if the
caller dies, all of them do.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent dies."""
USER_ERROR = 2
"""Exit code of a run that was refused: ValueError or FileNotFoundError, one line."""
HUNG = 70
"""Exit code of a rank that found itself hanging."""
DEBUG_VARIABLE = "MMLLM_DEBUG"
"""Set to show tracebacks of refused runs too."""
WORDS_VARIABLE = "MMLLM_LAST_WORDS"
"""File for the words of the first rank that fails."""
FORESEEN = (ValueError, OSError, FloatingPointError)
"""What can go wrong in a run that is right: the line says it all, a traceback would hide it."""

TIMEOUT = datetime.timedelta(minutes=10)
"""A rank that waits longer for another takes it for dead."""


STOPPED = 143
"""Exit code of a run that was told to stop and saved: 128 + 15, as shells say SIGTERM."""


class RankFailed(RuntimeError):
    """A rank ended with an error; its own words are the message."""


def under_torchrun() -> bool:
    """Somebody else started the ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join() -> None:
    """Join torch's process group, once a process: under torchrun by its environment, else by the socket that `launch` left open.
    NCCL where there is CUDA, gloo elsewhere."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    listen_fd = os.environ.get("MMLLM_LISTEN_FD")
    if "MASTER_PORT" in os.environ and listen_fd is None:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    if ranks == 1:
        store: dist.Store = dist.HashStore()
    else:
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, timeout=TIMEOUT,
                              master_listen_fd=int(listen_fd) if rank == 0 and listen_fd else None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)


def launch(function: str, argument: Any, ranks: int) -> None:
    """Call `function` ("package.module:name") with a picklable argument on each of `ranks` new processes and wait for
    all."""
    with tempfile.TemporaryDirectory(prefix="mmllm-launch-") as folder:
        order, words = Path(folder) / "argument.pickle", Path(folder) / "error"
        order.write_bytes(pickle.dumps(argument))
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        # large blocks stay in the process instead of going back to the kernel and being faulted in again at every step
        environment = {"OMP_NUM_THREADS": threads, "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
                       "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_ARENA_MAX": "2", "GLOO_SOCKET_IFNAME": "lo",
                       **os.environ}
        process = subprocess.Popen([sys.executable, "-m", "mmllm.launch", function, str(order), str(ranks), str(words),
                                    str(os.getpid())], env=environment)
        with pass_on(signal.SIGTERM, process), pass_on(signal.SIGUSR1, process):
            try:
                code = process.wait()
            except KeyboardInterrupt:
                process.wait()
                raise
        if code != 0:
            last = words.read_text() if words.is_file() else f"a rank ended with exit code {code} and no word (killed?)"
            raise ValueError(last) if code == USER_ERROR else RankFailed(last)


@contextlib.contextmanager
def pass_on(number: int, process: subprocess.Popen[bytes]) -> Generator[None]:
    """While inside, a signal to this process goes to another instead. Only a main thread can do so; others change
    nothing."""
    try:
        before = signal.signal(number, lambda *_: process.send_signal(number))
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)


def die_with_parent(parent: int) -> None:
    """Be killed when `parent` ends, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def run_rank(function: Callable[[Any], None], argument: Any, rank: int, words: Path) -> int:
    """One rank's life, after the fork; returns its exit code."""
    try:
        function(argument)
    except (ValueError, FileNotFoundError) as error:
        if DEBUG_VARIABLE in os.environ:
            traceback.print_exc()
        write_once(words, str(error))
        return USER_ERROR
    except BaseException as error:
        # where another rank failed before, this one did because of it
        foreseen = isinstance(error, (KeyboardInterrupt, SystemExit, *FORESEEN)) or words.exists()
        if not foreseen or DEBUG_VARIABLE in os.environ:
            traceback.print_exc()
        write_once(words, f"rank {rank}: {type(error).__name__}: {error}")
        return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    return 0


def last_words(text: str) -> None:
    """From a rank that ends itself."""
    if WORDS_VARIABLE in os.environ:
        write_once(Path(os.environ[WORDS_VARIABLE]), text)


def write_once(path: Path, text: str) -> None:
    """The first rank's words are kept: the others fail because it did."""
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(text)


def main(name: str, order: Path, ranks: int, words: Path, parent: int) -> int:
    """The process that forks: import, fork, wait."""
    die_with_parent(parent)
    module, attribute = name.split(":")
    function = getattr(importlib.import_module(module), attribute)
    argument = pickle.loads(order.read_bytes())                                # written by our own caller a moment ago
    # bound before the fork: nobody can take the port
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(listener.getsockname()[1]), WORLD_SIZE=str(ranks),
                      MMLLM_LISTEN_FD=str(listener.fileno()), **{WORDS_VARIABLE: str(words)})
    gc.freeze()  # what was imported stays shared between the ranks instead of being copied as they count references
    me, children = os.getpid(), dict[int, int]()
    for rank in range(ranks):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            die_with_parent(me)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            code = run_rank(function, argument, rank, words)
            sys.stdout.flush()
            sys.stderr.flush()
            # no atexit: what the ranks share is the parent's
            os._exit(code)
        children[pid] = rank
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: [os.kill(pid, number) for pid in children])
    # the terminal sends it to the ranks as well
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return wait(children, words)


def wait(children: dict[int, int], words: Path) -> int:
    """Until every rank has ended; the first that fails ends the others."""
    failed = 0
    while children:
        pid, status = os.wait()
        rank, code = children.pop(pid, -1), os.waitstatus_to_exitcode(status)
        if code == 0 or failed:
            continue
        failed = code if code > 0 else 1
        write_once(words, f"rank {rank} was killed by {signal.Signals(-code).name}" if code < 0 else
                   f"rank {rank} ended with exit code {code} and no word")
        time.sleep(2.0 if code == HUNG else 0.2)                               # let the others say what they saw
        for other in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])))
