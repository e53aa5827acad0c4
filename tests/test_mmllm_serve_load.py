"""Thirty-two clients for two minutes, some of whom hang up: tools/bench/serve.py on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import serving

BENCH = Path(__file__).parent.parent / "tools" / "bench" / "serve.py"


@pytest.mark.slow
def test_nobody_fails_waits_three_times_as_long_or_hears_anothers_answer(tmp_path: Path) -> None:
    model = serving.drawer(tmp_path / "model").folder.path
    command = [sys.executable, str(BENCH), str(model), "--clients", "32", "--seconds", "120"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
