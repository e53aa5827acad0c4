"""What every run leaves behind: its folder, `recipe.json`, `metrics.jsonl`, TensorBoard events, and the lines on the
screen.

A record in `metrics.jsonl` is what was measured at a step; the line on the screen is the same record made short. A run
that continues drops the records after the step it continues from, so the file reads as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: written beside, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        file.write(json.dumps(value, indent=1, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a run, oldest first; a last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    records: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def resident_bytes() -> int:
    """Memory of this process in RAM."""
    import psutil
    return int(psutil.Process().memory_info().rss)


def seed_all(seed: int) -> None:
    """Python's, NumPy's and torch's generators."""
    import random

    import numpy as np
    import torch
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def log_line(record: Mapping[str, Any], steps: int) -> str:
    """One step on one line: known fields in their own words, anything else as it is."""
    shown = {"lr": "{:.2e}", "grad_norm": "{:.2f}", "tokens_per_s": "{:,.0f} tokens/s", "memory_bytes": "{:.1f} GB"}
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    for name, value in record.items():
        if name in ("step", "tokens", "seconds", "z"):
            continue
        if name == "memory_bytes":
            value = value / 1e9
        text = shown.get(name, "{:.4f}" if isinstance(value, float) else "{}").format(value)
        parts.append(text if name in ("tokens_per_s", "memory_bytes") else f"{name} {text}")
    return "  ".join(parts)


class Log:
    """Where one run's records go. Only the first rank has one that writes."""

    def __init__(self, folder: Path, steps: int, *, after_step: int = 0, tensorboard: bool = False,
                 title: str = "") -> None:
        """`after_step`: the step that the run continues from; later records are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(folder) if record["step"] <= after_step]
        path = folder / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.file = path.open("a")
        self.steps = steps
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 0.2 s: only when asked for
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)
        self.progress: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            self.progress = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
            self.task = self.progress.add_task(title or folder.name, total=steps, completed=after_step)
            self.progress.start()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()
        if self.progress is not None:
            self.progress.stop()

    def record(self, values: Mapping[str, Any]) -> None:
        """A measured step: to the file, to TensorBoard, to the screen."""
        self.file.write(json.dumps(dict(values)) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.events.add_scalar(name, value, values["step"])
        self.say(log_line(values, self.steps))
        if self.progress is not None:
            self.progress.update(self.task, completed=values["step"])

    def say(self, line: str) -> None:
        """A line for the reader."""
        if self.progress is not None:
            self.progress.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def resolve_precision(precision: str) -> torch.dtype:
    """auto: bf16 only where the hardware multiplies it. Without, a CPU multiplies bf16 matrices 5–8 × slower than
    fp32."""
    import torch
    if precision == "auto":
        flags = Path("/proc/cpuinfo")
        words = set(flags.read_text().split()) if flags.is_file() else set[str]()
        native = torch.cuda.is_available() or words & {"avx512_bf16", "amx_bf16"}
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


class StopOnSignal:
    """Inside, SIGTERM and SIGUSR1 (which Slurm can send some time before a limit) are remembered and acted on between steps, by every
    rank at the same step; afterwards they do what they did before."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> StopOnSignal:
        self.received = False
        try:
            self.before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        except ValueError:  # only a main thread hears signals
            self.before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python, and not to be had back

    def _remember(self, *_: Any) -> None:
        self.received = True

    def asked(self) -> bool:
        import torch
        import torch.distributed as dist
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.received
        flag = torch.tensor([int(self.received)], device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
