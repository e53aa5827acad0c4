"""Run a function on two gloo ranks: each gets one of the arguments, and the results come back in rank order."""

import importlib
import multiprocessing
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist


def on_two_ranks(function: str, arguments: list[Any]) -> list[Any]:
    """`function`: "module:name"; results must be what torch.save takes."""
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, port, function, argument, folder)) for rank, argument in enumerate(arguments)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
            if process.is_alive():
                process.kill()
        assert all(process.exitcode == 0 for process in ranks), f"{function} failed: exit codes {[p.exitcode for p in ranks]}"
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(len(arguments))]


def _rank(rank: int, port: int, function: str, argument: Any, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    module, name = function.split(":")
    torch.save(getattr(importlib.import_module(module), name)(argument), Path(folder) / str(rank))
    dist.destroy_process_group()
