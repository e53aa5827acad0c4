"""The grammar behind vLLM's interface, driven as vLLM drives it: requests come, go and move between steps, and are sampled anyhow."""

from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch

from mmllm.generate.vllm_grammar import GrammarProcessor

VOCAB = tiny_model.vocabulary()


class Direction(Enum):
    """vLLM's MoveDirectionality."""

    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass
class Update:
    """vLLM's BatchUpdate."""

    removed: list[int] = field(default_factory=list)
    added: list[tuple[int, Any, list[int], list[int]]] = field(default_factory=list)
    moved: list[tuple[int, int, Direction]] = field(default_factory=list)


@pytest.fixture
def processor(tmp_path: Path) -> GrammarProcessor:
    VOCAB.save(tmp_path / "vocab.json")
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path), max_model_len=90))
    return GrammarProcessor(config, torch.device("cpu"), False)


@pytest.mark.parametrize("seed", range(5))
def test_pictures_are_whole_and_legal_while_requests_come_go_and_move(processor: GrammarProcessor, seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    places = dict[int, tuple[list[int], list[int], int | None]]()  # row of the batch: prompt, output, max_tokens
    ended = list[tuple[list[int], list[int], int | None]]()
    for _ in range(300):
        update = Update()
        for index in [i for i, (prompt, out, most) in places.items()
                      if len(out) == most or len(prompt) + len(out) == 90 or (out and out[-1] in (VOCAB.eos, VOCAB.user))]:
            ended.append(places.pop(index))
            update.removed.append(index)
        if len(places) < 6:
            index = min(set(range(6)) - set(places))
            prompt, out = [VOCAB.bos, 5, VOCAB.boi][:int(rng.integers(2, 4))], list[int]()
            most = None if rng.random() < 0.3 else int(rng.integers(30, 60))
            places[index] = (prompt, out, most)
            update.added.append((index, SimpleNamespace(max_tokens=most), prompt, out))
        if rng.random() < 0.2 and len(places) > 1:
            a, b = map(int, rng.choice(sorted(places), 2, replace=False))
            places[a], places[b] = places[b], places[a]
            update.moved.append((a, b, Direction.SWAP))
        elif rng.random() < 0.2 and places and max(places) < 7:
            source = max(places)
            places[source + 1] = places.pop(source)
            update.moved.append((source, source + 1, Direction.UNIDIRECTIONAL))
        processor.update_state(update if update.removed or update.added or update.moved else None)
        logits = torch.randn(max(places) + 1, VOCAB.size + 64) * 5
        logits[:, VOCAB.boi] += 12
        free = torch.tensor([i not in places for i in range(len(logits))])
        before = logits.clone()
        logits = processor.apply(logits)
        assert torch.equal(logits[free], before[free])
        ids = torch.distributions.Categorical(logits=logits).sample()
        for index, (_, out, _) in places.items():
            out.append(int(ids[index]))
    pictures = 0
    for prompt, out, _ in ended:
        row = [*prompt, *out]
        while VOCAB.boi in row:
            row = row[row.index(VOCAB.boi) + 1:]
            h, w = VOCAB.grids[row[0] - VOCAB.grid(*VOCAB.grids[0])]
            VOCAB.codes(row[1:1 + 2 * h * w], h, w)  # refuses an illegal one
            assert row[1 + 2 * h * w] == VOCAB.eoi  # and none is cut
            pictures += 1
    assert len(ended) > 10 and pictures > 20 and not processor.is_argmax_invariant()
