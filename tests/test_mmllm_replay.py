"""A step gone wrong is computed again, document by document, and says which of them it was."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from toy_rows import VOCAB, ToyRows, tiny

from data.loader import Row
from mmllm.cli import run
from mmllm.config import Pretrain
from mmllm.megatron.metrics import documents
from mmllm.megatron.replay import split
from mmllm.megatron.train import fit
from mmllm.runs.replay import main


@dataclass(frozen=True)
class OneBadDocument(ToyRows):
    """The second document of row 9 trains on what no other does, or on weights that are no numbers."""

    weight: float = 1.0
    hits: tuple[int, ...] = (9,)

    def row(self, number: int) -> Row:
        row = super().row(number)
        keys = tuple(f"toy-{number}-{i}" for i in range(len(row.cu_seqlens) - 1))
        if number not in self.hits:
            return replace(row, keys=keys)
        first, end = row.cu_seqlens[1:3]
        labels, weight = row.labels.copy(), row.loss_weight.copy()
        labels[first:end] = VOCAB.first_image + 77
        weight[first:end] *= np.float32(self.weight)
        return replace(row, keys=keys, labels=labels, loss_weight=weight)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    """Two steps, saved; the third is not finite."""
    recipe = tiny(tmp_path_factory.mktemp("replay"), steps=5, save_every=1)
    with pytest.raises(FloatingPointError, match=r"step 2, rank 0: .*toy-8-0.*bad_step_0000002_rank_0"):
        fit(recipe, OneBadDocument(weight=float("nan")))
    return recipe


def test_documents_of_a_row_come_apart_whole() -> None:
    row = OneBadDocument().row(3)
    parts = split(row, VOCAB)
    assert [int(part.cu_seqlens[1]) for part in parts] == documents(row, VOCAB.pad).tolist()
    assert np.array_equal(np.concatenate([part.tokens[:part.cu_seqlens[1]] for part in parts]), row.tokens[:sum(documents(row, VOCAB.pad))])
    assert [part.keys[0] for part in parts] == list(row.keys[:len(parts)])
    assert all(len(part.tokens) % 128 == 0 for part in parts)


def test_the_document_that_made_it_not_finite_is_first(stopped: Pretrain) -> None:
    report = main(stopped.out / "bad_step_0000002_rank_0.pt")
    assert (report["checkpoint"], report["step"]) == ("step_0000002", 2)
    assert report["documents"][0]["key"] == "toy-9-1" and np.isnan(report["documents"][0]["of_step"])
    assert all(np.isfinite(part["of_step"]) for part in report["documents"][1:])


def test_the_parts_add_up_to_the_step_and_its_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny(tmp_path, steps=3, save_every=1, spikes=replace(tiny(tmp_path).spikes, rule="stop", window=2, deviations=0.5))
    with pytest.raises(FloatingPointError, match="step 3: "):
        fit(recipe, OneBadDocument(weight=50.0))
    run(["replay", str(tmp_path / "bad_step_0000002_rank_0.pt"), "--json"])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert sum(part["of_step"] for part in report["documents"]) == pytest.approx(report["then"]["loss"], rel=1e-5)
    assert report["documents"][0]["key"] == "toy-9-1"
    assert report["documents"][0]["gradient"] > 5 * report["documents"][1]["gradient"]


def test_the_list_is_short_and_says_by_which_weights(stopped: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    run(["replay", str(stopped.out / "bad_step_0000002_rank_0.pt"), "--checkpoint", str(stopped.out / "checkpoints/step_0000001"),
         "--top", "2"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "step 2 by the weights of step_0000001, 1 updates before it"
    assert lines[3].endswith("toy-9-1") and len(lines) == 6 and lines[5].endswith("more (--top)")


def test_a_step_without_a_checkpoint_before_it_asks_for_one(stopped: Pretrain, tmp_path: Path) -> None:
    lone = tmp_path / "bad_step_0000002_rank_0.pt"
    lone.write_bytes((stopped.out / lone.name).read_bytes())
    with pytest.raises(FileNotFoundError, match="none at or before step 2: give one with --checkpoint"):
        main(lone)
    with pytest.raises(FileNotFoundError, match=r"no file bad_step_\*\.pt"):
        main(tmp_path / "metrics.jsonl")
