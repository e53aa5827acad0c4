"""What the ranks of a distributed run know together. Without a process group each of these is about this process alone."""

import torch
import torch.distributed as dist
from torch import Tensor


def grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if grouped() else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of all ranks' tensors of one shape, in place. → x"""
    if grouped():
        dist.all_reduce(x)
    return x


def counts_of_ranks(count: int, device: torch.device) -> list[int]:
    """Each rank's number, in rank order."""
    if not grouped():
        return [count]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=device)
    counts[rank()] = count
    return sum_over_ranks(counts).tolist()


def rows_of_ranks(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [m] of the ranks' tensors [n_r, …] put behind each other in rank order: → [m, …], the same on every rank."""
    if not grouped():
        return x[index]
    first = sum(counts_of_ranks(len(x), x.device)[:rank()])
    mine = (index >= first) & (index < first + len(x))
    out = torch.zeros(len(index), *x.shape[1:], dtype=x.dtype, device=x.device)
    out[mine] = x[index[mine] - first]
    return sum_over_ranks(out)


def joined(x: Tensor) -> Tensor:
    """The ranks' tensors [n_r, …] behind each other in rank order: → [n, …], the same on every rank."""
    total = sum(counts_of_ranks(len(x), x.device))
    return rows_of_ranks(x, torch.arange(total, device=x.device))
