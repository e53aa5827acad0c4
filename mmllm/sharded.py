"""Weights and optimizer states that may lie in pieces on several ranks (FSDP2), saved and loaded as wholes.

A checkpoint holds full tensors, written by the first rank: any number of ranks, sharded or not, can go on from it. Tables of a quantizer
stay whole on every rank (they are looked up, moved and revived by index), so their gradients are averaged here.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmllm.manifest import STATE, entry, finish
from mmllm.run import write_json
from tokenizer.conv import ResidualBlock
from tokenizer.ranks import rank, sum_over_ranks
from tokenizer.vit import Block

BLOCKS = {"ResidualAttentionBlock", "Block", "SiglipEncoderLayer", "CLIPEncoderLayer", "Dinov2Layer"}
"""Of towers that open_clip, timm and transformers build."""
TENSORS = "state.pt"


def shard(module: nn.Module, whole: set[nn.Parameter]) -> nn.Module:
    """Shard in place, block by block, all parameters but `whole`."""
    if isinstance(module, FSDPModule):
        return module
    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for part in list(module.modules()):
        if isinstance(part, (Block, ResidualBlock)) or type(part).__name__ in BLOCKS:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params=whole)
    return module


def settle(module: nn.Module) -> None:
    """Back to pieces after a forward pass that no backward pass follows."""
    if isinstance(module, FSDPModule):
        module.reshard()


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of parameters that every rank holds whole."""
    for parameter in parameters:
        if parameter.grad is not None:
            sum_over_ranks(parameter.grad).div_(dist.get_world_size())


def clip(optimizer: torch.optim.Optimizer, limit: float) -> float:
    """Scale the gradients of all parameters down to a joint norm of at most `limit` (0: measure alone). → the norm before"""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    pieces = [g.to_local() for g in grads if isinstance(g, DTensor)]
    square = sum((g.float().square().sum() for g in grads if not isinstance(g, DTensor)), torch.zeros((), device=grads[0].device))
    if pieces:
        square = square + sum_over_ranks(torch.stack([g.float().square().sum() for g in pieces]).sum())
    norm = square.sqrt()
    if limit:
        for g in grads:
            g.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


# Wholes and pieces ------------------------------------------------------------------------------------------------

def gathered(value: Any) -> Any:
    """The same with every tensor whole, on the CPU; called by all ranks."""
    if isinstance(value, Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
    if isinstance(value, Mapping):
        return {key: gathered(part) for key, part in value.items()}
    return [gathered(part) for part in value] if isinstance(value, list) else value


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` lies: this rank's piece of it, on its device."""
    if isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device, like.dtype), like.device_mesh, like.placements)
    return whole.to(like.device, like.dtype)


@torch.no_grad()
def put(state: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy tensors, whole or lying alike, into those of a state dict, in place."""
    for name, tensor in state.items():
        tensor.copy_(saved[name] if isinstance(saved[name], DTensor) else placed(saved[name], tensor))


def put_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a gathered state; each parameter's moments lie as the parameter does."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {number: {name: placed(value, parameters[number]) if isinstance(value, Tensor) and value.shape == parameters[number].shape
                      and value.ndim else value for name, value in values.items()} for number, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


# On disk ----------------------------------------------------------------------------------------------------------

def save(folder: Path, step: int, tensors: Mapping[str, Any], numbers: dict[str, Any], keep_last: int) -> None:
    """Write `step_XXXXXXX` under a folder, whole or not at all; called by all ranks."""
    tensors = gathered(tensors)
    if rank() == 0:
        beside = folder / f"step_{step:07d}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        torch.save(tensors, beside / TENSORS)
        write_json(beside / STATE, numbers)
        finish(beside, step, {name: entry(beside / name) for name in (TENSORS, STATE)}, keep_last)
    if dist.is_initialized():
        dist.barrier()


def read(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / TENSORS, "cpu", weights_only=True)
