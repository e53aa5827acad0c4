"""A moving average of a module's weights, which reconstructs better than the weights of any one step.

It is a second set of tensors, never swapped in: `copy_to` fills a module of the same kind, made for evaluation or saving, and
training goes on beside it. Arithmetic is between a rank's own pieces, so DTensors (FSDP) need no communication."""

from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Of a module's parameters and float buffers, in fp32 or better; its other buffers (counts, indices) are those of the last update."""

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        self.tensors = {name: value.detach().to(_wide(value), copy=True) for name, value in _named(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's weights, after each step of its optimizer. Update n (from 0) keeps min(decay, (1 + n) / (10 + n)) of the
        average, so the start, which knows nothing, is gone after a few dozen."""
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mine, value in self._pairs(_named(module), "the module to average"):
            if mine.is_floating_point():
                mine.lerp_(value.to(mine.dtype), 1 - kept)  # in bf16 a ten-thousandth of the way is no way at all
            else:
                mine.copy_(value)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the weights of a module, sharded alike if at all, with the average, in the module's own precision."""
        for mine, value in self._pairs(_named(module), "the module to fill"):
            value.copy_(mine)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensors": dict(self.tensors)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, value in self._pairs(state["tensors"], "the saved average"):
            mine.copy_(value)
        self.updates = int(state["updates"])

    def _pairs(self, other: dict[str, Tensor], what: str) -> list[tuple[Tensor, Tensor]]:
        """(average, other's), this rank's pieces, name by name."""
        for name in sorted(self.tensors.keys() | other.keys()):
            shapes = [list(tensors[name].shape) if name in tensors else "missing" for tensors in (self.tensors, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name} is {shapes[0]} in the average and {shapes[1]} in {what}: both have to be of one configuration")
        return [(_local(mine), _local(other[name])) for name, mine in self.tensors.items()]


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype


def _local(x: Tensor) -> Tensor:
    """This rank's piece of a DTensor; a plain tensor is its own. By name, since the import takes a second."""
    return getattr(x, "to_local", lambda: x)()
