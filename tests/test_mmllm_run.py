"""A run that is told to stop hears it between steps, and only while it runs."""

import os
import signal
import subprocess
import sys
import threading

from mmllm.run import StopOnSignal


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
