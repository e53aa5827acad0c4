"""What a step is worth, for the log: tokens and model operations a second, memory, and where in the data the run is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data.loader import Loader, Row
from data.vocab import Vocab
from mmllm import flops
from mmllm.config import Pretrain
from mmllm.megatron.batch import Rows
from mmllm.megatron.parallel import Layout
from mmllm.run import resident_bytes


@dataclass(kw_only=True)
class Pace:
    """This rank's work since the last record."""

    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    flops: float = 0.0


def documents(row: Row, pad: int) -> NDArray[np.int32]:
    """Lengths of a row's documents [d], padding left out."""
    lengths = np.diff(row.cu_seqlens)
    return lengths[:-1] if row.tokens[row.cu_seqlens[-2]] == pad else lengths


def add(pace: Pace, rows: Sequence[Row], vocab: Vocab, recipe: Pretrain) -> None:
    """A step on these rows."""
    pace.tokens += sum(len(row.tokens) for row in rows)
    pace.flops += flops.step_flops(recipe.model, vocab.size, np.concatenate([documents(row, vocab.pad) for row in rows]),
                                   sum(int(np.count_nonzero(row.loss_weight)) for row in rows))


def peak_tflops(recipe: Pretrain, layout: Layout) -> float | None:
    """Of one GPU: what the recipe says, or the table."""
    if recipe.peak_tflops is not None or layout.device.type != "cuda":
        return recipe.peak_tflops
    known = flops.peak(torch.cuda.get_device_name(layout.device))
    return known[1] if known else None


def throughput(pace: Pace, layout: Layout, peak: float | None) -> dict[str, float]:
    """Over all ranks; TFLOP/s and MFU of one of them. Called by all."""
    seconds = time.perf_counter() - pace.began
    done = torch.tensor([pace.tokens, pace.flops], dtype=torch.float64, device=layout.device)
    if layout.ranks > 1:
        dist.all_reduce(done)
        done /= layout.ranks / layout.dp                                       # ranks that share rows count them each
    tokens, operations = done.tolist()
    tflops = operations / seconds / layout.ranks / 1e12
    return {"tokens_per_s": tokens / seconds, "tflops": tflops, **({"mfu": tflops / peak} if peak else {})}


def memory_bytes(layout: Layout) -> int:
    """Most that this rank's GPU has held, or what the process holds now."""
    return torch.cuda.max_memory_allocated(layout.device) if layout.device.type == "cuda" else resident_bytes()


def position(loader: Rows, rows: int) -> dict[str, float]:
    """Rows consumed, how many times each source was gone through, and how many documents longer than a row were cut or left out in the
    blocks before."""
    found: dict[str, float] = {"rows": rows}
    if isinstance(loader, Loader) and rows:
        plan, cursor = loader.plan, loader.state(rows)["cursor"]
        block, _ = plan.row(rows - 1)
        placed = block.order[:block.starts[rows - block.first_row]]
        begun = np.bincount(block.source[placed[block.begin[placed] == 0]], minlength=len(plan.names))  # of a document, not its pieces
        found |= {f"epoch/{name}": (cursor["taken"][i] + int(begun[i])) / plan.orders[i].size for i, name in enumerate(plan.names)}
        found |= {name: cursor[name] for name in ("cut", "left_out") if cursor[name]}
    return found
