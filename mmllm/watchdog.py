"""A step that never ends: who waits where, in writing, and an end to it.

A collective that one rank does not join hangs all others without a word. Each rank has a thread that looks at a clock; when the last
beat is too long ago it writes the Python stacks of all threads to the rank's own file and ends the process, and whoever started the
ranks ends the rest. A thread of Python cannot look while native code holds the interpreter: for that case the interpreter's own alarm is
set anew at each look, and fires when the looking stops.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from mmllm.launch import HUNG, last_words

LOOKS = 8
"""Looks at the clock in one timeout."""


class Watchdog:
    """Inside, more than `timeout_s` without a beat ends the process; 0 watches nothing."""

    def __init__(self, folder: Path, rank: int, timeout_s: float) -> None:
        self.folder, self.rank, self.timeout_s = folder, rank, timeout_s
        self.last, self.doing, self.ended = time.monotonic(), "start", threading.Event()

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path = self.folder / f"hang_rank_{self.rank}.txt"
            self.path.unlink(missing_ok=True)
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Alive; `doing` is what comes next."""
        self.last, self.doing = time.monotonic(), doing

    def _look(self) -> None:
        while not self.ended.wait(self.timeout_s / LOOKS):
            waited = time.monotonic() - self.last
            if waited > self.timeout_s:
                words = (f"rank {self.rank} hangs: {self.doing} takes longer than hang_timeout_s = {self.timeout_s:g} s; the stacks of its "
                         f"threads are in {self.path}")
                with self.path.open("w") as file:
                    file.write(words + "\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                last_words(words)
                print(f"mmllm: {words}", file=sys.stderr, flush=True)
                os._exit(HUNG)
            faulthandler.dump_traceback_later(2 * self.timeout_s, exit=True)
