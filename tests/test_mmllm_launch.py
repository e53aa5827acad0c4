"""Ranks that the command starts itself: one that dies takes the others along, and says why."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mmllm.launch import RankFailed, launch


@pytest.fixture(autouse=True)
def ranks_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_an_error_on_one_rank_ends_all_and_is_reported() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1: KeyError: 'no such row'"):
        launch("toy_rows:fail_on_rank_one", "no such row", 2)
    assert time.monotonic() - began < 120                                       # the other rank sleeps for ten minutes


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankFailed, match="rank 1 was killed by SIGKILL"):
        launch("toy_rows:fail_on_rank_one", "", 2)


def test_told_to_stop_it_tells_every_rank(tmp_path: Path) -> None:
    def stop_when_ready() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    launch("toy_rows:write_when_terminated", str(tmp_path), 2)
    thread.join()
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]
