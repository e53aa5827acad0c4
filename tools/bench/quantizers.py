"""Time and extra memory of one forward and backward pass of our quantizers beside those of other projects.

    python tools/bench/quantizers.py [--tokenflow PATH/TO/TokenFlow] [--vqp] [--rounds 5] [--threads 1] [--json]

TokenFlow's quantizer is read from the user's checkout of ByteFlow-AI/TokenFlow, --vqp is the installed vector-quantize-pytorch. Each
measurement is a process of its own; the two of a pair take turns, so that a busy minute of the machine meets both. A time is the
process's own CPU seconds, which with one thread are the seconds on a free core; extra memory is how far the process's resident set
rises above what it was with module, latents and libraries in place, gradients included. Needs Linux, for /proc.

Letters: N latents, K entries, d dims, MB 10^6 bytes.
"""

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.lookup_free import BinaryQuantizer
from tokenizer.quantize import Quantizer, QuantizerConfig, SharedIndexQuantizer

N, K = 1024, 32_768
TOKENFLOW = "tokenflow/tokenizer/vq_model.py"
VQP = "vector_quantize_pytorch"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One of ours beside one of theirs, and by how much ours has to be better."""

    what: str
    ours: str
    """A name in JOBS, as `theirs`."""
    theirs: str
    faster: float
    """Their time over ours is at least this."""
    leaner: float | None = None
    """Their extra memory over ours is at least this."""


PAIRS = (
    Pair(what=f"shared index, K = {K}, 32 + 8 dims", ours="shared", theirs="TokenFlow", faster=8, leaner=10),
    Pair(what="the same; TokenFlow without its entropy term backward", ours="shared", theirs="TokenFlow, two losses", faster=8, leaner=10),
    Pair(what=f"EMA by cosine, K = {K}, 32 dims", ours="ema", theirs="VectorQuantize", faster=2, leaner=4),
    Pair(what="bits on the sphere, ours 2^18, theirs 2^14", ours="bsq", theirs="LFQ", faster=20),
)

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]
"""latents [N, d] → (quantized [N, d], loss [])"""


@dataclass(frozen=True, kw_only=True)
class Job:
    module: nn.Module
    dims: int
    """d"""
    run: Pass


# Ours -------------------------------------------------------------------------------------------------------------

def ours(quantizer: Quantizer) -> Job:
    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        out = quantizer(z)
        return out.entries, torch.stack(list(out.losses.values())).sum()
    return Job(module=quantizer, dims=quantizer.dims, run=run)


def table(kind: Any, pixel_dims: int) -> Job:
    return ours(SharedIndexQuantizer(QuantizerConfig(
        codebook_size=K, semantic_dim=32, pixel_dims=(pixel_dims,), semantic_weights=(1.0,), semantic_norm=True, pixel_norm=True,
        semantic_table=kind, pixel_table=kind, gradient="latent")))


# Theirs -----------------------------------------------------------------------------------------------------------

def tokenflow(checkout: Path, entropy: bool) -> Job:
    """Their trainer adds all three losses up; the third has weight 0, but its gradient is computed. Usage is not counted: with
    `show_usage` a training step on a CPU raises."""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    tree = ast.parse((checkout / TOKENFLOW).read_text())
    wanted = ("VectorQuantizer", "compute_entropy_loss")  # the module itself imports a training stack
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in wanted]
    exec(compile(tree, TOKENFLOW, "exec"), names)
    quantizer = names["VectorQuantizer"](n_e=K, e_dim=40, beta=0.25, entropy_loss_ratio=0.0, l2_norm=True, show_usage=False, split=[32, 8])

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        out, losses, _ = quantizer(z.view(4, -1, 16, 40).permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1).reshape(z.shape), torch.stack(losses[:3 if entropy else 2]).sum()
    return Job(module=quantizer, dims=40, run=run)


def vector_quantize(name: str) -> Job:
    import vector_quantize_pytorch as vqp  # pyright: ignore[reportMissingImports]
    if name == "LFQ":
        dims, quantizer = 14, vqp.LFQ(codebook_size=2**14, dim=14, spherical=True, commitment_loss_weight=0.25)
    else:
        dims, quantizer = 32, vqp.VectorQuantize(dim=32, codebook_size=K, use_cosine_sim=True, decay=0.99, commitment_weight=0.25,
                                                 rotation_trick=False)  # straight through, as ours

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        out, _, loss = quantizer(z[None])
        return out[0], loss.sum()
    return Job(module=quantizer, dims=dims, run=run)


JOBS: dict[str, Callable[[Path], Job]] = {
    "shared": lambda _: table("free", 8), "ema": lambda _: table("ema", 0),
    "bsq": lambda _: ours(BinaryQuantizer(QuantizerConfig(kind="bsq", bits=(18,), entropy_latents=N))),
    "TokenFlow": lambda checkout: tokenflow(checkout, True), "TokenFlow, two losses": lambda checkout: tokenflow(checkout, False),
    "VectorQuantize": lambda _: vector_quantize("VectorQuantize"), "LFQ": lambda _: vector_quantize("LFQ"),
}


# One measurement --------------------------------------------------------------------------------------------------

def resident(kind: str) -> float:
    """VmRSS: the process's resident memory now, VmHWM: at most since the mark was reset. MB"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def measure(job: Job, repeats: int) -> dict[str, float]:
    """CPU seconds and seconds of the fastest pass, extra MB at the peak of all."""
    torch.manual_seed(0)
    z = torch.randn(N, job.dims, requires_grad=True)
    weight = torch.randn(N, job.dims)
    job.module.train()
    warm = torch.randn(64, 64, requires_grad=True)  # what the first product and the first backward pass load is nobody's
    torch.log_softmax(warm @ warm, -1).sum().backward()

    def step() -> None:
        z.grad = None
        job.module.zero_grad()
        out, loss = job.run(z)
        ((out * weight).sum() + loss).backward()

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before, own, wall = resident("VmRSS"), list[float](), list[float]()
    for _ in range(repeats + 1):
        began = time.process_time(), time.perf_counter()
        step()
        own.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    return {"cpu_s": min(own[1:]), "wall_s": min(wall[1:]), "extra_mb": resident("VmHWM") - before}  # the first pass warms up


def alone(name: str, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--job", name, "--repeats", str(options.repeats), "--threads", str(options.threads)]
    command += ["--tokenflow", str(options.tokenflow)] if options.tokenflow else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


# The table --------------------------------------------------------------------------------------------------------

def compare(pairs: list[Pair], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each pair's measurements, ratios, and whether they are what they have to be: the least time and the median memory of all rounds."""
    names = dict.fromkeys(name for pair in pairs for name in (pair.ours, pair.theirs))
    rounds = [{name: alone(name, options) for name in names} for _ in range(options.rounds)]
    of = {name: {"cpu_s": min(r[name]["cpu_s"] for r in rounds), "wall_s": min(r[name]["wall_s"] for r in rounds),
                 "extra_mb": statistics.median(r[name]["extra_mb"] for r in rounds)} for name in names}
    rows = list[dict[str, Any]]()
    for pair in pairs:
        ratios = {key: of[pair.theirs][key] / max(value, 1e-6) for key, value in of[pair.ours].items()}
        passed = ratios["cpu_s"] >= pair.faster and ratios["extra_mb"] >= (pair.leaner or 0)
        rows.append({**asdict(pair), "measured": {"ours": of[pair.ours], "theirs": of[pair.theirs]}, "ratios": ratios, "passed": passed})
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = ["| one pass of | CPU s: ours, theirs | faster | by the clock | extra MB: ours, theirs | leaner | has to be | |",
             "|---" * 8 + "|"]
    for row in rows:
        mine, other, ratios = row["measured"]["ours"], row["measured"]["theirs"], row["ratios"]
        wanted = f"{row['faster']:g} × faster" + (f", {row['leaner']:g} × leaner" if row["leaner"] else "")
        lines.append(f"| {row['what']} | {mine['cpu_s']:.4f}, {other['cpu_s']:.4f} | {ratios['cpu_s']:.1f} × | {ratios['wall_s']:.1f} × "
                     f"| {mine['extra_mb']:.0f}, {other['extra_mb']:.0f} | {ratios['extra_mb']:.1f} × | {wanted} "
                     f"| {'passes' if row['passed'] else 'FAILS'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenflow", type=Path, help="checkout of ByteFlow-AI/TokenFlow")
    parser.add_argument("--vqp", action="store_true", help="the installed vector-quantize-pytorch too")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes in each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print every number instead of a table")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)  # this process is one measurement
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.job:
        with contextlib.redirect_stdout(None):  # some talk while they are built
            found = measure(JOBS[options.job](options.tokenflow), options.repeats)
        print(json.dumps(found))
        return 0
    if options.tokenflow and not (options.tokenflow / TOKENFLOW).exists():
        parser.error(f"--tokenflow is {options.tokenflow}, which has no {TOKENFLOW}: give a checkout of ByteFlow-AI/TokenFlow")
    if options.vqp and importlib.util.find_spec(VQP) is None:
        parser.error("--vqp needs vector-quantize-pytorch: pip install vector-quantize-pytorch==1.32.0")
    pairs = [pair for pair in PAIRS if (options.tokenflow if pair.theirs.startswith("TokenFlow") else options.vqp)]
    if not pairs:
        parser.error("nothing to compare with: give --tokenflow, --vqp or both")
    rows = compare(pairs, options)
    versions = {"torch": torch.__version__, **({VQP: importlib.metadata.version("vector-quantize-pytorch")} if options.vqp else {})}
    setting = {"N": N, "threads": options.threads, "rounds": options.rounds, "repeats": options.repeats,
               "cpu": torch.backends.cpu.get_cpu_capability(), **versions}
    print(json.dumps({**setting, "pairs": rows}, indent=1) if options.json
          else table_of(rows) + "\n\n" + ", ".join(f"{key} {value}" for key, value in setting.items()))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
