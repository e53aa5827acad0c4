"""Balanced losses pull equally hard at the quantizer's output, and their weights stay once warm-up is over."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmllm.launch import join, launch
from tokenizer.balance import Balance, BalanceConfig

CONFIG = BalanceConfig(reference="pixels", ratios={"text": 1.0, "semantic": 0.5}, every=2, warmup_steps=6)


def losses(z: Tensor, text: float = 300.0) -> dict[str, Tensor]:
    """Gradients by z: ones, `text` × ones, 0.01 × ones."""
    return {"pixels": z.sum(), "text": text * z.sum(), "semantic": 0.01 * z.sum()}


def output(n: int = 4) -> Tensor:
    return torch.ones(n, requires_grad=True) * 1.0


def test_weighted_gradients_have_the_ratio_asked_for() -> None:
    balance, z = Balance(CONFIG), output()
    balance(losses(z), [z], 0)
    norms = {name: torch.autograd.grad(w * losses(z)[name], z)[0].norm() for name, w in balance.weights().items()}
    assert torch.isclose(norms["text"], norms["pixels"]) and torch.isclose(norms["semantic"], norms["pixels"] / 2)


def test_the_total_is_the_weighted_sum_and_its_gradient_flows() -> None:
    balance, z = Balance(CONFIG), output()
    total = balance(losses(z), [z], 0)
    weights = balance.weights()
    assert torch.isclose(total, torch.stack([weights[n] * x for n, x in losses(z).items()]).sum())
    assert torch.allclose(torch.autograd.grad(total, z)[0], torch.full((4,), 1 + 1 + 0.5))


def test_norms_are_over_all_tensors_and_a_loss_may_miss_some() -> None:
    balance, (a, b) = Balance(BalanceConfig(reference="pixels", ratios={"text": 1.0})), (output(9), output(16))
    balance({"pixels": a.sum() + b.sum(), "text": a.sum()}, [a, b], 0)
    assert balance.norms.tolist() == [5, 3]


def test_measurements_are_averaged_every_so_many_steps_and_end_with_warm_up() -> None:
    balance, seen = Balance(CONFIG), list[float]()
    for step in range(10):
        z = output()
        balance(losses(z, text=100.0 if step < 2 else 200.0), [z], step)
        seen.append(balance.norms[1].item())
    second = 0.9 * 200 + 0.1 * 400  # a gradient of 100 in four places has norm 200
    assert seen == pytest.approx([200, 200, second, second, *[0.9 * second + 0.1 * 400] * 6])


def test_weights_stay_between_a_thousandth_and_a_thousand() -> None:
    balance, z = Balance(CONFIG), output()
    balance({"pixels": z.sum(), "text": 1e6 * z.sum(), "semantic": 1e-6 * z.sum()}, [z], 0)
    assert balance.weights() == pytest.approx({"pixels": 1, "text": 1e-3, "semantic": 1e3})


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_a_loss_that_is_off_or_overflows_changes_no_weight(factor: float) -> None:
    balance, z = Balance(CONFIG), output()
    balance(losses(z, text=factor), [z], 0)
    assert balance.weights()["text"] == 1
    balance(losses(z), [z], 2)
    before = balance.weights()["text"]
    balance(losses(z, text=factor), [z], 4)
    assert balance.weights()["text"] == before == pytest.approx(1 / 300)


def test_evaluation_measures_nothing() -> None:
    balance, z = Balance(CONFIG).eval(), output()
    assert torch.isclose(balance(losses(z), [z], 0), torch.stack(list(losses(z).values())).sum())


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one() -> None:
    one, first, second = Balance(CONFIG), Balance(CONFIG), Balance(CONFIG)
    for step in range(8):
        z = output()
        if step == 3:
            second.load_state_dict(first.state_dict())
        for balance in (one, first if step < 3 else second):
            balance(losses(z, text=10.0 + step), [z], step)
    assert second.weights() == one.weights()


def each_rank(folder: str) -> None:
    join()
    balance, z = Balance(CONFIG), output()
    balance(losses(z, text=30.0 if dist.get_rank() == 0 else 40.0), [z], 0)
    torch.save(balance.norms, Path(folder) / f"norms-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_all_ranks_have_the_norms_of_the_joined_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    launch("test_tokenizer_balance:each_rank", str(tmp_path), 2)
    a, b = (torch.load(tmp_path / f"norms-{rank}.pt") for rank in range(2))
    assert torch.equal(a, b) and a[1] / a[0] == pytest.approx(50 / 2**0.5)


def test_losses_that_cannot_be_balanced_are_named() -> None:
    balance, z = Balance(CONFIG), output()
    with pytest.raises(ValueError, match=r"balanced are the losses pixels, text, semantic, given were pixels"):
        balance({"pixels": z.sum()}, [z], 0)
    elsewhere = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="loss text is no function of the quantizer's output"):
        balance({**losses(z), "text": elsewhere.sum()}, [z], 0)
    with pytest.raises(ValueError, match="text is balanced against itself"):
        BalanceConfig(reference="text", ratios={"text": 1.0})
