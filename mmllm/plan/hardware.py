"""GPUs: what their makers publish, and which part of it is reached.

Two tables and they are not alike. *Published*: dense peaks, bandwidths and sizes from the data sheets. *Reached*: parts of those, a few
of them fitted to published training runs on H100 and held against the others (tests/test_mmllm_plan.py says which are which). No number
here was measured with this code.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmllm.flops import PEAKS


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links."""

    name: str
    bf16: float
    """Dense matrix products, FLOP/s."""
    fp8: float | None
    """The same in fp8; None where there is none."""
    memory_bytes: float
    """What a process may use."""
    memory_bandwidth: float
    """bytes/s."""
    link: float
    """To a GPU of its NVLink domain, bytes/s each way."""
    network: float
    """To a GPU of another, bytes/s each way."""
    node: int = 8
    """GPUs of a host."""
    domain: int = 8
    """GPUs that NVLink joins."""
    host: float = 25e9
    """To the host's memory, bytes/s a GPU with all of them at it."""
    source: str
    """Where the figures are from."""


GIB, TERA = 1 << 30, 10**12
GPUS = {
    "a100": Gpu(name="A100 SXM 80 GB", bf16=PEAKS["A100"] * TERA, fp8=None, memory_bytes=79.1 * GIB, memory_bandwidth=2.039e12,
                link=300e9, network=25e9,
                source="NVIDIA A100 data sheet (2021); DGX A100: eight 200 Gb/s adapters"),
    "h100": Gpu(name="H100 SXM 80 GB", bf16=PEAKS["H100"] * TERA, fp8=1978.9e12, memory_bytes=79.1 * GIB, memory_bandwidth=3.35e12,
                link=450e9, network=50e9,
                source="NVIDIA H100 data sheet (2023), without sparsity; DGX H100: eight 400 Gb/s adapters"),
    "h200": Gpu(name="H200 SXM 141 GB", bf16=PEAKS["H200"] * TERA, fp8=1978.9e12, memory_bytes=139.8 * GIB, memory_bandwidth=4.8e12,
                link=450e9, network=50e9,
                source="NVIDIA H200 data sheet (2024), without sparsity; eight 400 Gb/s adapters"),
    "b200": Gpu(name="B200 SXM 180 GB", bf16=PEAKS["B200"] * TERA, fp8=4.5e15, memory_bytes=178.3 * GIB, memory_bandwidth=7.7e12,
                link=900e9, network=50e9,
                source="NVIDIA HGX B200 data sheet (2024), without sparsity; eight 400 Gb/s adapters"),
    "gb200": Gpu(name="GB200 NVL72 186 GB", bf16=PEAKS["GB200"] * TERA, fp8=5e15, memory_bytes=184 * GIB, memory_bandwidth=8e12,
                link=900e9, network=50e9, node=4, domain=72,
                source="NVIDIA GB200 NVL72 data sheet (2024), without sparsity; a 400 Gb/s adapter each"),
    "b300": Gpu(name="B300 SXM 288 GB", bf16=PEAKS["B300"] * TERA, fp8=4.5e15, memory_bytes=268 * GIB, memory_bandwidth=8e12, link=900e9,
                network=100e9,
                source="NVIDIA HGX B300 data sheet (2025), without sparsity; eight 800 Gb/s adapters"),
}


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Parts of the published figures that are reached, one set for all GPUs."""

    bf16: float
    """Of the matrix peak, in layers and head. Fitted on Megatron-LM's 16B row (TP4): what a big model's products sustain at 700 W."""
    fp8: float
    """The same in fp8, casts not included. Fitted on Megatron-Bridge's Llama-3 8B row (25.11)."""
    experts: float
    """Of that, in the grouped products of experts. Fitted on Megatron-Bridge's Qwen3-30B-A3B row (26.06)."""
    tp_in_sight: float
    """Part of tensor-parallel time that stays in sight where it is overlapped. Fitted on Megatron-LM's 32B row (TP8)."""
    eager: float
    """Of all that, in modules of transformers. Fitted on torchtitan's uncompiled 8B (FSDP, bf16), whose H100s had 500 W: a low guess."""
    attention: float = 0.5
    """Of the bf16 peak, in fused attention, forward and backward together, 3.5 forward passes' products in all. Assumed: FlashAttention-3
    reaches 0.75 at best, forward (arXiv:2407.08608, abstract); backward and causal rows of a few thousand tokens reach less."""
    memory: float = 0.9
    """Of the memory bandwidth, in norms, gates, casts and the optimizer. Assumed, as what a large copy reaches."""
    link: float = 0.8
    """Of NVLink, in collectives. Assumed, as the next two."""
    network: float = 0.8
    """Of the network's."""
    launch_s: float = 5e-6
    """Not a part: from one kernel of a layer to the next, however little it does."""


REACHED = Reached(bf16=0.6, fp8=0.6, experts=0.16, tp_in_sight=0.5, eager=0.55)


def gpu_of(name: str) -> Gpu:
    """By the table's name. Errors: ValueError."""
    if name not in GPUS:
        raise ValueError(f"--hardware {name} is not in the table: give one of {', '.join(GPUS)}, or add its data sheet to "
                         "mmllm/plan/hardware.py")
    return GPUS[name]
