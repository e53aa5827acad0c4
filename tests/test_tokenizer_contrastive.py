"""The contrastive loss of several ranks is that of one rank with their joined batch, value and gradients."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmllm.launch import join, launch
from tokenizer import contrastive
from tokenizer.contrastive import Contrastive, Kind, TextTower, contrastive_loss
from tokenizer.semantic import TowerConfig

KINDS: tuple[Kind, ...] = ("sigmoid", "softmax")
RANKS, B, D = 3, 4, 5


def model(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two linear towers, scale and bias."""
    generator = torch.Generator().manual_seed(0)
    towers = [torch.randn(D, D, generator=generator) for _ in range(2)]
    return [x.to(dtype).requires_grad_() for x in (*towers, torch.tensor(1.5), torch.tensor(-2.0))]


def inputs(b: int = RANKS * B, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, D, generator=generator).to(dtype), torch.randn(b, D, generator=generator).to(dtype)


def units(image: Tensor, text: Tensor, towers: list[Tensor]) -> tuple[Tensor, Tensor]:
    return F.normalize(image @ towers[0], dim=-1), F.normalize(text @ towers[1], dim=-1)


def obvious(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, kind: Kind) -> Tensor:
    logits, n = scale.exp() * image @ text.T, len(image)
    if kind == "softmax":
        return (F.cross_entropy(logits, torch.arange(n)) + F.cross_entropy(logits.T, torch.arange(n))) / 2
    return -F.logsigmoid((2 * torch.eye(n, dtype=logits.dtype) - 1) * (logits + bias)).sum() / n


def each_rank(folder: str) -> None:
    """On one of several ranks: its third of the batch, then gradients averaged as data parallelism does."""
    join()
    found: dict[str, list[Tensor]] = {}
    for kind in KINDS:
        parameters, here = model(), slice(dist.get_rank() * B, (dist.get_rank() + 1) * B)
        image, text = inputs()
        loss = contrastive_loss(*units(image[here], text[here], parameters), parameters[2], parameters[3], kind)
        (7 * loss).backward()
        found[kind] = [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]
        for x in found[kind]:
            dist.all_reduce(x.div_(RANKS))
    if dist.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def test_several_ranks_give_the_loss_and_gradients_of_their_joined_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    launch("test_tokenizer_contrastive:each_rank", str(tmp_path), RANKS)
    found = torch.load(tmp_path / "found.pt")
    for kind in KINDS:
        parameters = model()
        loss = contrastive_loss(*units(*inputs(), parameters), parameters[2], parameters[3], kind)
        (7 * loss).backward()
        for joined, apart in zip((loss.detach(), *(p.grad for p in parameters)), found[kind], strict=True):
            assert joined is not None
            torch.testing.assert_close(apart, joined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_formula(kind: Kind) -> None:
    ours, plain = model(torch.float64), model(torch.float64)
    pairs = inputs(dtype=torch.float64)
    a = contrastive_loss(*units(*pairs, ours), ours[2], ours[3], kind)
    b = obvious(*units(*pairs, plain), plain[2], plain[3], kind)
    a.backward()
    b.backward()
    assert torch.allclose(a, b, rtol=1e-12)
    for x, y in zip(ours, plain, strict=True):
        assert x.grad is not None and torch.allclose(x.grad, torch.zeros_like(x) if y.grad is None else y.grad, rtol=1e-9, atol=1e-12)


def test_tiles_do_not_change_the_sigmoid_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = model(torch.float64)
    pairs = units(*inputs(dtype=torch.float64), parameters)
    whole = contrastive_loss(*pairs, parameters[2], parameters[3])
    monkeypatch.setattr(contrastive, "TILE", 5 * RANKS * B)  # five texts at a time, of twelve
    assert torch.allclose(contrastive_loss(*pairs, parameters[2], parameters[3]), whole, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_ends_at_a_hundred(kind: Kind) -> None:
    pairs = units(*inputs(), model())
    at, above = (contrastive_loss(*pairs, torch.tensor(math.log(100) + more), torch.tensor(-10.0), kind) for more in (0, 3))
    assert torch.equal(at, above)


def test_autocast_does_not_reach_the_logits() -> None:
    pairs = units(*inputs(), model())
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_loss(*pairs, torch.tensor(4.0), torch.tensor(-10.0))
    assert torch.equal(inside, contrastive_loss(*pairs, torch.tensor(4.0), torch.tensor(-10.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_training_finds_the_pairs(kind: Kind) -> None:
    torch.manual_seed(0)
    image, text, loss = torch.nn.Linear(D, 8), torch.nn.Linear(D, 8), Contrastive(kind)
    x = torch.randn(12, D)
    optimizer = torch.optim.Adam([*image.parameters(), *text.parameters(), *loss.parameters()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(image(x), text(-x)).backward()
        optimizer.step()
    assert (F.normalize(text(-x), dim=-1) @ F.normalize(image(x), dim=-1).T).argmax(-1).tolist() == list(range(12))


def test_what_does_not_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 5\], texts as \[2, 6\]"):
        contrastive_loss(torch.zeros(2, 5), torch.zeros(2, 6), torch.tensor(0.0))
    with pytest.raises(ValueError, match="sigmoid or softmax, not 'hinge'"):
        contrastive_loss(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor(0.0), kind="hinge")  # pyright: ignore[reportArgumentType]


def test_a_small_text_tower_tells_texts_apart_and_learns() -> None:
    tower = TextTower.small(TowerConfig(width=32, heads=2, embed_dim=16, context_len=6), 50, lambda text: [ord(c) % 50 for c in text])
    ids = tower.tokenize(["ab", "a much longer text"])
    assert ids.shape == (2, 6) and ids[0].tolist() == [47, 48, 50, 0, 0, 0] and ids[1, 5] == 50
    out = tower(ids)
    assert out.shape == (2, tower.width) and not torch.allclose(out[0], out[1])
    out.sum().backward()
    assert all(p.grad is not None for p in tower.parameters())
