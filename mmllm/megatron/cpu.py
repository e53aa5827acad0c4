"""Run megatron-core where there is no CUDA device: import this module before `megatron.core`. With CUDA it does
nothing.

megatron-core writes its device into its source ("cuda", `torch.cuda.…`). As its modules are imported here, those names
are rewritten: "cuda" to "cpu", `torch.cuda` to `torch.mcore_cpu`, a small stand-in made below. Nothing that torch has
is changed, so every other library in the process still sees an ordinary torch without CUDA, and a training step pays
nothing for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import logging
import marshal
import os
import re
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RULES = [(re.compile(pattern), text) for pattern, text in (
    (r"\btorch\.cuda\.(\w+Tensor)\b", r"torch.\1"),                              # names that Tensor.type() gives
    (r"\.cuda\((torch\.cuda\.current_device\(\))?", r'.to("cpu", '),             # Tensor.cuda(...)
    (r"\btorch\.cuda\b(?!\.memory\b)", "torch.mcore_cpu"),
    (r"(['\"])cuda(:\d)?\1", r"\1cpu\1"),                                        # device="cuda"
    (r"\.is_cuda\b", ".is_cpu"),
    (r"\bpin_memory=True", "pin_memory=False"),
    (r"\bjit_fuser = torch\.compile", "jit_fuser = noop_decorator"),             # no compiler, quick start
    (r"from apex\.optimizers import FusedAdam\b", f"from {__name__} import FusedAdam"),
    (r"from apex\.optimizers import FusedSGD\b", "from torch.optim import SGD"),
    (r"self\.fp8 = fp8 is not None", "self.fp8 = bool(fp8)"),                    # its default is False: asks for Transformer Engine
)]


CACHE = Path(__file__).parent / "__pycache__"
RULES_KEY = hashlib.sha256(repr([(rule.pattern, new) for rule, new in RULES]).encode()).hexdigest()[:8]


def rewrite(text: str) -> str:
    """megatron-core's source with the rules applied."""
    if any(word in text for word in ("cuda", "apex", "pin_memory", "jit_fuser")):
        for rule, new in RULES:
            text = rule.sub(new, text)
    return text


class RewritingLoader(importlib.machinery.SourceFileLoader):
    """Loads a module of megatron-core rewritten; keeps the bytecode beside our own: a second less at each start."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = Path(self.get_filename(fullname))
        stat = path.stat()
        version = f"{RULES_KEY}.{stat.st_mtime_ns:x}.{stat.st_size:x}.{sys.implementation.cache_tag}"
        kept = CACHE / f"{fullname}.{version}.pyc"
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
            code = marshal.loads(kept.read_bytes())
            if isinstance(code, types.CodeType):
                return code
        code = self.source_to_code(rewrite(path.read_text(encoding="utf-8")).encode(), str(path))
        # an installation that may not be written to: no cache
        with contextlib.suppress(OSError):
            CACHE.mkdir(exist_ok=True)
            beside = kept.with_suffix(f".{os.getpid()}")
            beside.write_bytes(marshal.dumps(code))
            beside.replace(kept)
        return code


class RewritingFinder(importlib.abc.MetaPathFinder):
    """Hands megatron-core's modules to the rewriting loader and leaves all others alone."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
                  ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = RewritingLoader(spec.loader.name, spec.loader.path)
        return spec


class Stream(torch.cpu.Stream):
    """The one stream a CPU has: nothing is ever on a side stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record_event(self, *args: Any) -> Any: return Event()
    def synchronize(self) -> None: ...
    def __eq__(self, other: object) -> bool: return True
    def __hash__(self) -> int: return 0


class Event(torch.cpu.Event):
    """A moment on the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time_s = 0.0

    def record(self, stream: object = None) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:                 # milliseconds, as CUDA's
        return (end_event.time_s - self.time_s) * 1e3


class Generators:
    """`torch.cuda.default_generators[i]`: a CPU has one."""

    def __getitem__(self, device: int) -> torch.Generator:
        return torch.default_generator


class FusedAdam(torch.optim.Optimizer):
    """AdamW with Apex's and Transformer Engine's interface and state: the step count belongs to the group.

    So optimizer checkpoints have one format on CPU and GPU; megatron-core's distributed optimizer cannot resume torch's
    own Adam. The arithmetic is torch's fused kernel."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, adam_w_mode: bool = True, **_: Any) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)
        self.kernel: Callable[..., None] = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:                       # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            first, second = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            count = torch.tensor(float(group["step"]))
            self.kernel(params, [p.grad for p in params], first, second, [], [count] * len(params), lr=group["lr"],
                        beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                        weight_decay=group["weight_decay"], amsgrad=False, maximize=False)


def install() -> None:
    """Make `torch.mcore_cpu` and put the finder first."""
    def nothing(*args: Any, **kwargs: Any) -> None: ...

    cpu: Any = types.ModuleType("torch.mcore_cpu")
    vars(cpu).update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("_")})
    cpu.Stream, cpu.Event, cpu.default_stream = Stream, Event, torch.cpu.current_stream
    cpu.device, cpu.empty_cache, cpu._lazy_init = contextlib.nullcontext, nothing, nothing
    cpu._lazy_call = lambda function, **kwargs: function()
    cpu.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cpu.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cpu.manual_seed, cpu.default_generators, cpu.random = torch.manual_seed, Generators(), cpu
    cpu.OutOfMemoryError, cpu.CUDAGraph = torch.OutOfMemoryError, type("CUDAGraph", (), {})
    nvtx: Any = types.ModuleType("torch.mcore_cpu.nvtx")
    cpu.nvtx, nvtx.range_push, nvtx.range_pop = nvtx, nothing, nothing
    torch.mcore_cpu = cpu                                              # type: ignore[attr-defined]
    sys.modules["torch.mcore_cpu"], sys.modules["torch.mcore_cpu.nvtx"] = cpu, cpu.nvtx
    sys.meta_path.insert(0, RewritingFinder())


def import_quietly() -> None:
    """Import megatron-core without its remarks on the GPU libraries that are absent."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("dist_checkpointing.strategies.torch", "distributed", "models.gpt.gpt_layer_specs", "optimizer"):
            importlib.import_module(f"megatron.core.{name}")


if not torch.cuda.is_available() and not hasattr(torch, "mcore_cpu"):
    install()
    import_quietly()
