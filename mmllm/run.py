"""What every run leaves behind: its folder, `recipe.json`, `metrics.jsonl`, TensorBoard events, and the lines on the
screen.

A record in `metrics.jsonl` is what was measured at a step; the line on the screen is the same record made short. A run
that continues drops the records after the step it continues from, so the file reads as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
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


SHOWN: dict[str, Callable[[Any], str]] = {
    "lr": lambda value: f"lr {value:.2e}", "grad_norm": lambda value: f"grad_norm {value:.2f}",
    "tokens_per_s": lambda value: f"{value:,.0f} tokens/s", "memory_bytes": lambda value: f"{value / 1e9:.1f} GB",
    "tflops": lambda value: f"{value:.3g} TFLOP/s", "mfu": lambda value: f"MFU {value:.1%}", "rows": lambda value: f"row {value:,}"}
UNSHOWN = ("step", "tokens", "seconds", "z", "samples", "spike")


def log_line(record: Mapping[str, Any], steps: int) -> str:
    """One step on one line: known fields in their own words, anything else as it is."""
    parts = [f"step {record['step']:>{len(str(steps))}}/{steps}"]
    epochs = [value for name, value in record.items() if name.startswith("epoch/")]
    for name, value in record.items():
        if name in SHOWN:
            parts.append(SHOWN[name](value))
        elif name not in UNSHOWN and not name.startswith("epoch/"):
            parts.append(f"{name} {f'{value:.4f}' if isinstance(value, float) else value}")
    if epochs:
        parts.append(f"epoch {min(epochs):.2f}" + (f"–{max(epochs):.2f}" if len(epochs) > 1 else ""))
    return "  ".join(parts)


class Log:
    """Where one run's records go. Only the first rank has one that writes."""

    def __init__(self, folder: Path, steps: int, *, after_step: int = 0, tensorboard: bool = False,
                 title: str = "", wandb: str = "", recipe: Mapping[str, Any] | None = None) -> None:
        """`after_step`: the step that the run continues from; later records are dropped. `wandb`: a project there, which gets `recipe`."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(folder) if record["step"] <= after_step]
        path = folder / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.file, self.unwritten, self.full = path.open("ab", buffering=0), bytearray(), False
        self.steps = steps
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 0.2 s: only when asked for
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)
        self.wandb = open_wandb(wandb, folder, recipe or {}) if wandb else None
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
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)
        if self.events is not None:
            self.events.close()
        if self.progress is not None:
            self.progress.stop()

    def record(self, values: Mapping[str, Any]) -> None:
        """A measured step: to the file, to TensorBoard, to the screen."""
        self.unwritten += json.dumps(dict(values)).encode() + b"\n"
        if (problem := self._write()) and not self.full:
            self.say(f"{self.file.name} cannot be written ({problem}): the run goes on, records wait in memory")
        self.full = bool(problem)
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.events.add_scalar(name, value, values["step"])
        if self.wandb is not None:
            self.wandb.log({name: value for name, value in values.items() if name != "step"}, step=values["step"])
        self.say(log_line(values, self.steps))
        if self.progress is not None:
            self.progress.update(self.task, completed=values["step"])

    def _write(self) -> str:
        """Whole lines or none. → what is in the way, if anything"""
        end = self.file.tell()
        try:
            if self.file.write(self.unwritten) == len(self.unwritten):
                self.unwritten.clear()
                return ""
            problem = "the disk is full"
        except OSError as error:
            problem = str(error)
        self.file.truncate(end)
        self.file.seek(end)
        return problem

    def say(self, line: str) -> None:
        """A line for the reader."""
        if self.progress is not None:
            self.progress.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def open_wandb(project: str, folder: Path, recipe: Mapping[str, Any]) -> Any:
    """A run of that project which goes on where it was, by the id kept in the run folder."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb is {project!r} but its package is not installed: pip install 'mmllm[wandb]', or leave it empty") from error
    name = folder / "wandb_id"
    if not name.is_file():
        name.write_text(secrets.token_hex(4))
    return wandb.init(project=project, dir=str(folder), name=folder.name, id=name.read_text(), resume="allow", config=dict(recipe),
                      settings=wandb.Settings(silent=True))


def resolve_precision(precision: str) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it. Without, a CPU multiplies bf16 matrices 5–8 × slower than fp32; an Intel Xeon with
    AVX-512's instructions but not AMX 2 × slower (a quick start a third)."""
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
        return bool(highest([self.received])[0])


def highest(flags: Sequence[int]) -> list[int]:
    """Of each flag over all ranks, so that all do the same."""
    import torch
    import torch.distributed as dist
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [int(flag) for flag in flags]
    agreed = torch.tensor([int(flag) for flag in flags], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return agreed.tolist()
