"""Finding a row among a billion documents: time to count the rows before it, time to find it, memory.

    python tools/bench/plan.py --documents 1e9 --row 1e8

Indexes are simulated (a hash makes keys and lengths: a picture of 576 codes with 16 to 2,000 tokens of text), since
10⁹ documents have 40 GB of them; what is measured is the plan's own work. Prints a table; --out writes it as JSON.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from data.chance import scrambled
from data.choices import Table
from data.config import DataConfig
from data.document import IMAGE, TEXT
from data.mixture import Source, Stage
from data.order import Group
from data.plan import Listed, Plan

SHARD = 10_000  # documents


def simulated(group: Group) -> Table:
    """Pairs of a picture and 16 to 2,000 tokens of text."""
    key_hash = np.concatenate([scrambled(np.arange(SHARD, dtype=np.uint64), shard) for shard in group.shards])
    n = len(key_hash)
    said = (16 * np.exp(np.log(125) * (key_hash >> np.uint64(40)).astype(np.float64) / 2**24)).astype(np.int32)
    zero, parts = np.zeros(n, np.int64), np.arange(n + 1, dtype=np.int64)
    shard = np.repeat(np.arange(len(group.shards), dtype=np.int32), SHARD)
    return Table(keys=np.zeros(0, np.bytes_), shard=shard, offsets=zero, sizes=zero, key_hash=key_hash, first_part=2 * parts,
                 kinds=np.tile(np.array([IMAGE, TEXT], np.int8), n), lengths=np.stack([np.full(n, 576, np.int32), said], 1).reshape(-1),
                 is_pair=np.ones(n, np.bool_), turns=zero, pictures=zero + 579, said=said.astype(np.int64), asked=zero, questions=zero,
                 first_prompt=parts, prompts=2 * parts[:-1] + 1)


def measure(documents: int, row: int, row_len: int) -> dict[str, float]:
    shards = documents // SHARD
    listed = Listed(np.full(shards, SHARD), documents * 1000, [], simulated)
    config = DataConfig(stages=(Stage(sources=(Source(shards="simulated"),)),), row_len=row_len)

    def plan() -> Plan:
        return Plan(config, {"simulated/train*": listed})

    plan().row(0)  # compiles
    one, start = plan(), time.perf_counter()
    one.row(row)
    found = {"documents": documents, "row": row, "row_len": row_len, "count_s": time.perf_counter() - start}
    state = one.state(row)
    found["documents_before"] = sum(state["cursor"]["taken"])
    near = np.random.default_rng(0).integers(row - 30_000, row, 200).tolist()  # of a group of shards whose indexes are in memory
    for name, rows in (("in_block_ms", range(row - 20, row)), ("other_block_ms", near)):
        times = list[float]()
        for number in rows:
            start = time.perf_counter()
            one.row(number)
            times.append(time.perf_counter() - start)
        found[name] = 1e3 * float(np.median(times))
    other, start = plan(), time.perf_counter()
    other.resume(state)
    block, members = other.row(row)
    found["resume_s"] = time.perf_counter() - start
    assert [m[0] for m in block.members(members)] == [m[0] for m in one.row(row)[0].members(one.row(row)[1])]
    found["peak_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, default=1e7)
    parser.add_argument("--row", type=float, default=5e5)
    parser.add_argument("--row-len", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = measure(int(args.documents), int(args.row), args.row_len)
    print("| " + " | ".join(result) + " |\n|" + "---|" * len(result) + "\n| " + " | ".join(f"{v:,.4g}" for v in result.values()) + " |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
