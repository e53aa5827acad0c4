"""Ranks that the command starts itself: one that dies takes the others along, and says why."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_rows import tiny

from mmllm.config import Parallel, Pretrain
from mmllm.launch import RankFailed, launch
from mmllm.manifest import newest, verify
from mmllm.run import read_metrics


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


def test_what_was_foreseen_is_one_line_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"token shard /data/train-000003\.tar is missing"):
        launch("toy_rows:refuse_on_rank_one", "token shard /data/train-000003.tar is missing", 2)
    assert capfd.readouterr().err == ""


def torchrun(recipe: Pretrain, *options: str) -> subprocess.Popen[bytes]:
    order = recipe.out.with_suffix(".pickle")
    order.write_bytes(pickle.dumps(recipe))
    script = recipe.out.with_suffix(".py")
    script.write_text("import pickle, sys\nfrom pathlib import Path\nfrom toy_rows import train\n"
                      "train(pickle.loads(Path(sys.argv[1]).read_bytes()))\n")
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
                             str(script), str(order)])


@pytest.mark.parametrize(("number", "options"), [
    pytest.param(signal.SIGTERM, (), id="SIGTERM"),
    pytest.param(signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"), id="SIGUSR1", marks=pytest.mark.slow)])
def test_under_torchrun_a_signal_saves_and_ends_the_run(tmp_path: Path, number: int, options: tuple[str, ...]) -> None:
    recipe = tiny(tmp_path / "run", steps=100_000, parallel=Parallel(ranks=2))
    process = torchrun(recipe, *options)
    while not any(record["step"] >= 3 for record in read_metrics(recipe.out)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) != 0                                                # torchrun's own: it was told to stop
    saved = newest(recipe.out / "checkpoints")
    assert saved is not None
    verify(saved)
