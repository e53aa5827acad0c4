"""The chunked output layer and loss equal the plain ones, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from mmllm.megatron import loss as loss_module
from mmllm.megatron.loss import HeadLoss, Targets, means, statistics


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_loss_and_gradients_are_those_of_cross_entropy(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", chunk_bytes)            # 1: the smallest chunks, 64 rows
    hidden, weight = torch.randn(150, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels, token_weight, columns = torch.randint(0, 37, (150,)), torch.rand(150), 37
    ours, nll, log_z = HeadLoss.apply(hidden, weight, labels, token_weight, 0.01, 0, columns, None)
    logits = hidden @ weight[:columns].t()                                      # the 3 rows of padding take no part
    expected_nll, expected_z = F.cross_entropy(logits, labels, reduction="none"), logits.logsumexp(-1)
    theirs = (token_weight * (expected_nll + 0.01 * expected_z ** 2)).sum()
    torch.testing.assert_close(nll, expected_nll)
    torch.testing.assert_close(log_z, expected_z)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(3 * value, (hidden, weight)) for value in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0])
    ours, nll, _ = HeadLoss.apply(hidden, weight, labels, torch.ones(2), 0.0, 0, 2, None)
    assert nll.tolist() == [0.0, 2e4]
    assert torch.isfinite(torch.autograd.grad(ours, hidden)[0]).all()


def test_means_are_over_the_weights_the_data_gave() -> None:
    targets = Targets(where=torch.arange(4), labels=torch.arange(4), weight=torch.full((4,), 0.1), z_loss=0.0,
                      image=torch.tensor([False, False, True, True]), counted=torch.tensor([1.0, 1.0, 1.0, 0.5]))
    sums = statistics(torch.tensor(2.0), torch.tensor([1.0, 3.0, 4.0, 7.0]), torch.ones(4), targets)
    found = means((sums + sums).tolist())                                       # two equal micro-batches
    assert found == pytest.approx({"loss": 4.0, "loss/text": 2.0, "loss/image": 5.0, "z": 1.0})
