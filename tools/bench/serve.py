"""Many clients at once against `mmllm serve`, each answer compared with the one that the same question got alone.

    OMP_NUM_THREADS=1 python tools/bench/serve.py MODEL [--clients 32 --seconds 120 --rows 32 --hang-up 0.05]

Clients ask in a closed loop: a chat, a stream, or a picture, of a fixed set; some hang up in the middle of a stream. What is said: answers
a second against one client alone, seconds of an answer, the most any client got over the least (fairness), wrong and failed answers,
rows that are left when all have gone, and how long the server takes to stop while everybody asks on. Exit code 1 where an answer is wrong
or fails, a row is left, fairness is above 3, or the server does not end by itself.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

WORDS = ("a red star", "two blue squares", "a green circle above a red star", "how many?", "what colour is the background?", "three stars")
START = "import sys; from pathlib import Path; from mmllm.serve.api import main; from mmllm.serve.settings import Settings; " \
        "main(Path(sys.argv[1]), Settings(port=0, rows=int(sys.argv[2]), stop_s=10))"

Question = tuple[str, dict[str, Any]]
"""A path and what is sent there."""


def questions() -> list[Question]:
    out = list[Question]()
    for seed, words in enumerate(WORDS):
        chat = {"model": "mmllm", "messages": [{"role": "user", "content": words}], "seed": seed, "temperature": 0.7, "max_tokens": 24}
        out += [("/v1/chat/completions", chat), ("/v1/chat/completions", {**chat, "stream": True, "guidance": 2.0}),
                ("/v1/images/generations", {"prompt": words, "seed": seed, "guidance": 1.0 + seed % 2})]
    return out


class Gone(Exception):
    """The client hung up, as it meant to."""


def ask(host: str, question: Question, hang_up: bool = False) -> str:
    """What the answer says, without what is new in each. Errors: OSError, HTTPException, ValueError."""
    path, body = question
    connection = http.client.HTTPConnection(host, timeout=120)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if hang_up:
            answer.read(100)
            raise Gone
        text = answer.read().decode()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {text}")
        if not body.get("stream"):
            found = json.loads(text)
            return found["data"][0]["b64_json"] if "data" in found else found["choices"][0]["message"]["content"]
        if not text.endswith("data: [DONE]\n\n"):
            raise ValueError(f"a stream ends in {text[-200:]}")
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    finally:
        connection.close()


@dataclass
class Load:
    """What clients met."""

    counts: list[int]
    seconds: list[float] = field(default_factory=list[float])
    failed: list[str] = field(default_factory=list[str])
    wrong: list[str] = field(default_factory=list[str])
    hung_up: int = 0
    wall_s: float = 0.0

    @property
    def fairness(self) -> float:
        return max(self.counts) / max(1, min(self.counts))


def load(host: str, clients: int, seconds: float, hang_up: float = 0.0) -> Load:
    """So many clients for so long. hang_up: share of streams that are left in the middle."""
    asked = questions()
    alone = [ask(host, question) for question in asked]
    out, end, lock = Load([0] * clients), time.monotonic() + seconds, threading.Lock()

    def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            at = rng.randrange(len(asked))
            start = time.monotonic()
            try:
                said = ask(host, asked[at], bool(asked[at][1].get("stream")) and rng.random() < hang_up)
                with lock:
                    out.counts[number] += 1
                    out.seconds.append(time.monotonic() - start)
                    if said != alone[at]:
                        out.wrong.append(f"{asked[at]}: {said[:100]!r} instead of {alone[at][:100]!r}")
            except Gone:
                out.hung_up += 1
            except (OSError, ValueError, http.client.HTTPException) as error:
                out.failed.append(f"{asked[at]}: {error!r}")

    start = time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.wall_s = time.monotonic() - start
    return out


def rows_left(host: str, within_s: float = 5.0) -> int:
    """Rows in line or in the batch once nobody asks."""
    end = time.monotonic() + within_s
    while True:
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", "/metrics")
        values = dict(line.rsplit(" ", 1) for line in connection.getresponse().read().decode().splitlines() if not line.startswith("#"))
        left = int(values["mmllm_rows_running"]) + int(values["mmllm_rows_waiting"])
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def stop_under_load(server: subprocess.Popen[str], host: str, clients: int) -> tuple[float, Counter[str]]:
    """Seconds until the process has ended, and what those met who asked on."""
    met, over = Counter[str](), threading.Event()

    def client() -> None:
        while not over.is_set():
            try:
                ask(host, questions()[0])
                met["answered"] += 1
            except ValueError as error:
                met[str(error)[:3]] += 1
            except (OSError, http.client.HTTPException):
                met["not connected"] += 1
                time.sleep(0.05)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    start = time.monotonic()
    server.send_signal(signal.SIGTERM)
    server.wait(60)
    took = time.monotonic() - start
    over.set()
    for thread in threads:
        thread.join()
    return took, met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--hang-up", type=float, default=0.05)
    args = parser.parse_args()
    command = [sys.executable, "-c", START, str(args.model), str(args.rows)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        host = server.stdout.readline().split("//")[1].split("/")[0]
        one = load(host, 1, min(10.0, args.seconds))
        many = load(host, args.clients, args.seconds, args.hang_up)
        left = rows_left(host)
        stopped_s, met = stop_under_load(server, host, args.clients)
    times = sorted(many.seconds)
    rate, rate_of_one = len(times) / many.wall_s, len(one.seconds) / one.wall_s
    print(f"{args.clients} clients, {many.wall_s:.0f} s: {len(times):,} answers, {rate:.1f} a second, "
          f"{rate / rate_of_one:.2f} × one client's")
    print(f"an answer takes {median(times):.2f} s, 95 % under {times[int(0.95 * len(times))]:.2f} s; alone {median(one.seconds):.3f} s")
    print(f"fairness {many.fairness:.2f} (a client got {min(many.counts)} to {max(many.counts)}), hung up {many.hung_up}, rows left {left}")
    print(f"wrong {len(many.wrong)}, failed {len(many.failed)} {(many.wrong + many.failed)[:2]}")
    print(f"stopped within {stopped_s:.1f} s under load, exit code {server.returncode}: {dict(met)}")
    raise SystemExit(bool(many.wrong or many.failed or left or many.fairness > 3 or server.returncode))


if __name__ == "__main__":
    main()
