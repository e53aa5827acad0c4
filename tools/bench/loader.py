"""Samples a second that become packed rows of 8,192 tokens, and how soon a run goes on: ours beside Energon and webdataset.

    OMP_NUM_THREADS=1 python tools/bench/loader.py [--samples 1000000] [--lengths fixed|lognormal] [--peers PYTHON] [--out FILE]

--peers is the Python of an environment that has megatron-energon, webdataset and torchdata, so that ours need not; what it lacks is
reported as not installed:

    python -m venv --system-site-packages PEERS && PEERS/bin/pip install megatron-energon==7.4.1 webdataset==1.0.2 torchdata==0.11.0

All read one set of token shards, and build sequences and rows with the same code of ours (sequence.interleaved, loader.assemble), so
what differs is order, reading, packing and state. Ours also chooses tasks and captions. Energon has its own index, from `energon
prepare`, and the settings of its documentation: crude samples, a cooker, shuffle buffer and sequences of 100 samples, and packing in
a buffer (`packing_buffer_size`, as many documents as our window) by sorted length, as "Packing" shows it. webdataset shuffles shards
and a buffer of 1,000, fills a row until the next document does not fit, and StatefulDataLoader (torchdata) keeps the state.

Each measurement is a process of its own on one core, except for Energon's workers, which have all; the loaders take turns, so that a
busy minute of the machine meets all. Wall time says what a user waits on a machine with nothing else to do, CPU seconds (of workers
too) what it costs on any. A resumed run is a new process; its time is from the loader's constructor to its first row, behind
imports. Ours goes on behind half of the set; the others where their measurement ended, since they come there only by reading.

Letters: s tokens in a row.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import importlib.metadata
import json
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from loader_ways import ROW_LEN, VOCAB, WAYS, WINDOW, Way

from data import shards
from data.document import IMAGE, TEXT, TokenDocument
from data.encode import write_manifest
from data.index import read_manifest, write_index
from data.loader import Row
from data.skipped import Skipped

TEXT_LEN = 474
"""ids; with 256 codes 730. Where lengths are lognormal it is the median, and sigma is 0.8."""
PACKAGES = ("megatron-energon", "webdataset", "torchdata")


# The shards -------------------------------------------------------------------------------------------------------

def write(folder: Path, samples: int, count: int, lengths: str) -> None:
    """Token shards of pictures with a text, as `mmllm data encode` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, targets = np.random.default_rng(0), list[Path]()
    pool = rng.integers(0, VOCAB.text_size, 1 << 20, np.int32)
    codes = VOCAB.image_ids(rng.integers(0, VOCAB.codebook_size, (1024, 1, 16, 16))).astype(np.int32)  # [1024, 256]
    for number in range(count):
        first, end = (samples * i // count for i in (number, number + 1))
        sizes = (np.full(end - first, TEXT_LEN) if lengths == "fixed"
                 else np.clip(rng.lognormal(np.log(TEXT_LEN), 0.8, end - first), 1, ROW_LEN - 300).astype(np.int64))
        begins = rng.integers(0, len(pool) - ROW_LEN, end - first)
        tokens = [TokenDocument((IMAGE, TEXT), ((16, 16), (0, 0)), (256, size), np.concatenate([codes[at % 1024], pool[at:at + size]]))
                  for at, size in zip(begins.tolist(), sizes.tolist(), strict=True)]
        targets.append(folder / f"train-{number:06d}.tar")
        shards.write_tar(targets[-1], ({"__key__": f"{first + i:09d}", "ids": token.to_bytes()} for i, token in enumerate(tokens)))
        write_index(targets[-1], tokens, "bench", Skipped())
    write_manifest(folder, targets, "bench", VOCAB)


# One measurement --------------------------------------------------------------------------------------------------

def filled(row: Row) -> tuple[int, int]:
    """(documents, tokens) of a row; padding is what is behind the last document."""
    return len(row.keys), int(row.cu_seqlens[len(row.keys)])


def cpu_s() -> float:
    """Seconds of this process and of its workers."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def speed(way: Way, folder: Path, state: Path, seconds: float) -> dict[str, float]:
    """Rows for `seconds`, behind some that warm up; then the state is saved."""
    began = time.perf_counter()
    run = way.open(folder, None, way.workers)
    next(run.rows)
    first_s, warm = time.perf_counter() - began, 2 * WINDOW // 8
    for _ in range(warm):
        next(run.rows)
    began, spent = time.perf_counter(), cpu_s()
    rows = documents = tokens = 0
    while time.perf_counter() - began < seconds:
        found = filled(next(run.rows))
        rows, documents, tokens = rows + 1, documents + found[0], tokens + found[1]
    wall, cpu = time.perf_counter() - began, cpu_s() - spent
    behind = run.save(state, warm + 1 + rows)
    return {"samples/s": documents / wall, "samples a CPU second": documents / cpu, "filled": tokens / rows / ROW_LEN,
            "first row s": first_s, "resumed behind samples": behind * documents / rows}


def resume(way: Way, folder: Path, state: Path) -> dict[str, float]:
    began = time.perf_counter()
    next(way.open(folder, state, way.workers).rows)
    return {"resumed s": time.perf_counter() - began}


def alone(name: str, step: str, python: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A step in a fresh process."""
    command = [python, __file__, "--job", name, "--step", step, "--folder", str(folder), "--seconds", str(options.seconds)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {step}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def job(options: argparse.Namespace) -> dict[str, Any]:
    """What this process is for."""
    if options.step == "versions":
        return {name: importlib.metadata.version(name) for name in PACKAGES if any(importlib.metadata.distributions(name=name))}
    way, state = WAYS[options.job], options.folder / f"state-{options.job.replace(', ', '-').replace(' ', '-')}"
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores if way.workers else cores[-1:])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    with contextlib.redirect_stdout(sys.stderr):
        for package in way.needs:  # imports are not measured
            import_module({"megatron-energon": "megatron.energon", "torchdata": "torchdata.stateful_dataloader"}.get(package, package))
        return speed(way, options.folder, state, options.seconds) if options.step == "speed" else resume(way, options.folder, state)


# The table --------------------------------------------------------------------------------------------------------

def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    peers, manifest = str(options.peers), read_manifest(folder)
    versions = alone("ours", "versions", peers, folder, options)
    able = {name: way for name, way in WAYS.items() if set(way.needs) <= set(versions)}
    index_s = None
    if "energon" in able and not (folder / ".nv-meta" / ".info.json").exists():
        began = time.perf_counter()
        subprocess.run([Path(peers).parent / "energon", "prepare", "--non-interactive", "--num-workers", "2", "--split-parts",
                        "train:train-.*", "--sample-type", "CrudeWebdataset", str(folder)], check=True, capture_output=True)
        index_s = time.perf_counter() - began
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in able}
    for _ in range(options.repeats):
        for name, way in able.items():
            python = peers if way.needs else sys.executable
            measured = [alone(name, step, python, folder, options) for step in ("speed", "resume")]
            found[name].append({**measured[0], **measured[1]})
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    loaders = {name: {key: median(each[key] for each in several) for key in several[0]} for name, several in found.items()}
    return {"loaders": loaders, "not installed": sorted(set(WAYS) - set(able)), "versions": {"torch": torch.__version__, **versions},
            "energon prepare s": index_s, "samples": manifest["documents"], "shards": len(manifest["shards"]),
            "ids": manifest["text_ids"] + manifest["image_codes"], "row_len": ROW_LEN, "seconds": options.seconds,
            "repeats": options.repeats, "load": [round(x, 1) for x in os.getloadavg()], "cores": len(os.sched_getaffinity(0))}


def table_of(report: dict[str, Any]) -> str:
    loaders, keys = report["loaders"], ("samples/s", "samples a CPU second")
    lines = ["| loader | samples/s | ours is | samples a CPU second | ours is | row filled | first row, s | resumed, s | behind samples |",
             "|---" * 9 + "|"]
    for name, row in loaders.items():
        rates = " | ".join(f"{row[key]:,.0f} | {loaders['ours'][key] / row[key]:.1f} ×" for key in keys)
        lines.append(f"| {name} | {rates} | {row['filled']:.2%} | {row['first row s']:.2f} | {row['resumed s']:.2f} | "
                     f"{row['resumed behind samples']:,.0f} |")
    return "\n".join(lines + [f"| {name} | not installed |" + " |" * 7 for name in report["not installed"]])


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="lognormal")
    parser.add_argument("--folder", type=Path, help="where the token shards are, or are written and kept; by default a temporary folder")
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), help="Python that has the other loaders")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    parser.add_argument("--job", choices=WAYS, help=argparse.SUPPRESS)  # this process is one measurement
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.job:
        found = job(options)
        print(json.dumps(found), flush=True)
        for worker in multiprocessing.active_children():  # some take their time
            worker.kill()
        os._exit(0)
    with tempfile.TemporaryDirectory() as name:
        folder = (options.folder or Path(name) / "tokens").absolute()
        if not (folder / "manifest.json").exists():
            write(folder, options.samples, options.shards, options.lengths)
        report = compare(folder, options)
    print(table_of(report) + "\n\n" + ", ".join(f"{key} {value}" for key, value in report.items() if key != "loaders"))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
