"""Numbers for Prometheus, in its text format (version 0.0.4): counters, sums and counts of seconds, and gauges read when asked."""

import threading
from collections import defaultdict
from collections.abc import Callable

TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTERS = {
    "mmllm_requests_total": "Requests by path and status",
    "mmllm_tokens_total": "Tokens by kind: read, text, image",
    "mmllm_pictures_total": "Pictures drawn",
    "mmllm_hung_up_total": "Requests whose client went away",
}
SECONDS = {
    "mmllm_request_seconds": "From a request's first byte to its answer's last",
    "mmllm_wait_seconds": "From a row's arrival to its place in the batch",
}


class Metrics:
    """Counts from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = defaultdict(float)
        self._buckets: dict[str, list[int]] = {name: [0] * (len(BOUNDS_S) + 1) for name in SECONDS}
        self._sums: dict[str, float] = dict.fromkeys(SECONDS, 0.0)
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        """name → what it says, and how to read it."""

    def add(self, name: str, value: float = 1.0, **labels: str | int) -> None:
        words = ",".join(f'{key}="{value}"' for key, value in labels.items())
        with self._lock:
            self._counts[name, f"{{{words}}}" if words else ""] += value

    def took(self, name: str, seconds: float) -> None:
        with self._lock:
            self._buckets[name][sum(seconds > bound for bound in BOUNDS_S)] += 1
            self._sums[name] += seconds

    def text(self) -> str:
        with self._lock:
            lines = list[str]()
            for name, words in COUNTERS.items():
                lines += [f"# HELP {name} {words}", f"# TYPE {name} counter"]
                lines += [f"{name}{labels} {value:g}" for (of, labels), value in sorted(self._counts.items()) if of == name]
            for name, words in SECONDS.items():
                lines += [f"# HELP {name} {words}", f"# TYPE {name} histogram"]
                total = 0
                for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self._buckets[name], strict=True):
                    total += count
                    lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
                lines += [f"{name}_sum {self._sums[name]:g}", f"{name}_count {total}"]
        for name, (words, read) in self.gauges.items():
            lines += [f"# HELP {name} {words}", f"# TYPE {name} gauge", f"{name} {read():g}"]
        return "\n".join(lines) + "\n"
