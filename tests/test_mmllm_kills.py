"""Killed at any moment, a run restarts from a whole checkpoint and ends bit for bit where it would have ended."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import same
from toy_rows import tiny

from mmllm.config import Parallel, Spikes
from mmllm.run import read_metrics


@pytest.mark.parametrize(("kills", "ranks"), [
    pytest.param(3, 2), pytest.param(20, 1, marks=pytest.mark.slow), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_bit_for_bit_the_same(tmp_path: Path, kills: int, ranks: int) -> None:
    whole = tiny(tmp_path / "whole", steps=40 + 20 * kills, save_every=3, keep_last=2, keep_every=30, parallel=Parallel(ranks=ranks),
                 spikes=Spikes(rule="skip", window=8, deviations=3.0, in_a_row=99), batch_ramp=((7, 8), (50, 12)))
    order, found = tmp_path / "order", tmp_path / "found"
    order.write_bytes(pickle.dumps(whole))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}  # as the commands start their ranks
    subprocess.run([sys.executable, str(Path(__file__).with_name("kill_runs.py")), str(order), str(kills), str(found)], check=True,
                   env={**os.environ, **threads})
    left = json.loads(found.read_text())
    assert len(left) == kills and any(each["half_written"] for each in left)    # some of the kills were in the middle of a save
    last = f"checkpoints/step_{whole.steps:07d}"
    assert same(tmp_path / "cut" / last, whole.out / last)
    alike = ("step", "loss", "loss/text", "loss/image", "grad_norm", "lr", "rows", "skipped")
    curves = [[[record.get(name) for name in alike] for record in read_metrics(folder)] for folder in (tmp_path / "cut", whole.out)]
    assert curves[0] == curves[1]
