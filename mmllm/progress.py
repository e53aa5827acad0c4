"""Progress of long work: a bar that moves on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any


def say(line: str) -> None:
    """A line for the reader, now."""
    print(line, flush=True)


class Progress:
    """A callable (done, total, measures) to hand to work; a context that ends its line."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit, self.start, self.last = title, unit, time.perf_counter(), 0.0
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import Progress as Bar
            self.bar = Bar()
            self.bar.start()
            self.task = self.bar.add_task(f"      {self.title}", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, measures: Mapping[str, float] | None = None) -> None:
        words = "  ".join(f"{name} {value:{',.0f' if abs(value) >= 1000 else '.3g'}}" for name, value in (measures or {}).items())
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=f"      {self.title}  {words}")
        elif done == total or time.perf_counter() - self.last > 5:  # a line every five seconds
            self.last = time.perf_counter()
            say(f"      {self.title}: {done}/{total} {self.unit}, {self.last - self.start:.0f} s  {words}")
