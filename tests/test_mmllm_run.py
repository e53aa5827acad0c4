"""A run that is told to stop hears it between steps, and only while it runs; what it measures is written whole."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmllm.run import Log, StopOnSignal, log_line, read_metrics


def test_a_stop_is_heard_inside_and_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number in StopOnSignal.SIGNALS]
    for number in StopOnSignal.SIGNALS:
        with StopOnSignal() as stop:
            assert not stop.asked()
            os.kill(os.getpid(), number)
            assert stop.asked()
    assert [signal.getsignal(number) for number in StopOnSignal.SIGNALS] == before


def test_a_process_past_its_run_ends_when_it_is_told_to() -> None:
    code = ("import os, signal; from mmllm.run import StopOnSignal\n"
            "with StopOnSignal(): os.kill(os.getpid(), signal.SIGTERM)\n"
            "print('past', flush=True); os.kill(os.getpid(), signal.SIGTERM); print('deaf')")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM and ended.stdout == "past\n"


def test_a_thread_that_hears_no_signals_runs_all_the_same() -> None:
    heard = list[bool]()

    def run() -> None:
        with StopOnSignal() as stop:
            heard.append(stop.asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard == [False]


def test_records_of_a_full_disk_wait_and_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    records = [{"step": step, "loss": step / 7} for step in range(1, 60)]
    try:
        with Log(tmp_path, 59) as log:
            for record in records:
                resource.setrlimit(resource.RLIMIT_FSIZE, (500 if 10 < record["step"] < 50 else hard, hard))
                log.record(record)
                assert read_metrics(tmp_path) == records[:len(read_metrics(tmp_path))]      # never half a line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert read_metrics(tmp_path) == records
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_a_line_says_what_was_measured() -> None:
    record = {"step": 7, "loss": 1.5, "grad_norm": 0.25, "lr": 3e-4, "tokens_per_s": 12345.6, "tflops": 412.3, "mfu": 0.4168,
              "memory_bytes": 71_300_000_000, "tokens": 1, "rows": 28_000, "epoch/a": 0.5, "epoch/b": 1.25, "samples": "x", "spike": "y"}
    assert log_line(record, 100) == ("step   7/100  loss 1.5000  grad_norm 0.25  lr 3.00e-04  12,346 tokens/s  412 TFLOP/s  MFU 41.7%  "
                                     "71.3 GB  row 28,000  epoch 0.50–1.25")


def test_records_reach_weights_and_biases_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (1, 3):                                                        # the second goes on with the first one's id
        with Log(tmp_path, 4, after_step=first - 1, wandb="test", recipe={"steps": 4}) as log:
            for step in (first, first + 1):
                log.record({"step": step, "loss": 1.0 / step})
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({path.name.split("-")[3] for path in runs}) == 1
    assert all(any(path.glob("*.wandb")) for path in runs)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
