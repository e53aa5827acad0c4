"""A rank that hangs ends the run within seconds and leaves in writing where it hung."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_rows import ToyRows, tiny

from data.loader import Row
from mmllm.config import Parallel, Pretrain
from mmllm.launch import RankFailed, launch
from mmllm.megatron.train import fit
from mmllm.run import read_metrics


@dataclass(frozen=True)
class SleepingRows(ToyRows):
    """The second rank never gets its rows of the third step."""

    def row(self, number: int) -> Row:
        if number == 10:
            time.sleep(600)
        return super().row(number)


def hang(recipe: Pretrain) -> None:
    fit(recipe, SleepingRows())


def test_a_hanging_rank_is_named_with_the_stacks_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank \d hangs: step 3 takes longer than hang_timeout_s = 3 s; .* are in .*hang_rank_\d.txt"):
        launch("test_mmllm_watchdog:hang", tiny(tmp_path, parallel=Parallel(ranks=2), hang_timeout_s=3.0), 2)
    assert time.monotonic() - began < 90
    first, second = ((tmp_path / f"hang_rank_{rank}.txt").read_text() for rank in (0, 1))
    assert "test_mmllm_watchdog.py" in second and "in row" in second
    assert "batch.py" in first and "in row" not in first                        # it waits for the other in a collective
    assert read_metrics(tmp_path)[-1]["step"] == 2


def test_native_code_that_keeps_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    """The regular expression takes longer than the universe, without once giving the interpreter away."""
    code = ("import re, sys; from pathlib import Path; from mmllm.watchdog import Watchdog\n"
            "with Watchdog(Path(sys.argv[1]), 0, 0.5) as watchdog:\n"
            "    import time; time.sleep(0.2); watchdog.beat('step 1'); re.match('(a+)+$', 'a' * 60 + 'b')")
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Timeout" in ended.stderr and 'File "<string>", line 3' in ended.stderr
    assert time.monotonic() - began < 60


def test_a_run_that_beats_is_left_alone(tmp_path: Path) -> None:
    fit(tiny(tmp_path, steps=3, hang_timeout_s=30.0), ToyRows())
    assert not list(tmp_path.glob("hang_*"))
