"""Distillation compares directions, on the grid of the codes."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer.distillation import distillation_loss, pooled


def features(grid: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(2, grid[0] * grid[1], 6, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_mean_angle_whatever_the_lengths() -> None:
    a, b = features((2, 3)), features((2, 3), 1)
    slow = torch.stack([1 - x @ y / x.norm() / y.norm() for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)]).mean()
    assert torch.isclose(distillation_loss(a, 7 * b, (2, 3), (2, 3)), slow)
    assert distillation_loss(3 * b, b, (2, 3), (2, 3)).abs() < 1e-6
    assert torch.isclose(distillation_loss(-b, b, (2, 3), (2, 3)), torch.tensor(2.0))


def test_a_coarser_scale_meets_the_mean_of_what_it_covers() -> None:
    x = features((4, 6))
    by_hand = F.avg_pool2d(x.mT.view(2, 6, 4, 6), 2).flatten(2).mT
    assert torch.allclose(pooled(x, (4, 6), (2, 3)), by_hand, atol=1e-6)
    assert distillation_loss(by_hand, x, (2, 3), (4, 6)).abs() < 1e-6


def test_grids_that_do_not_divide_keep_the_mean_of_a_constant_and_the_order_of_rows() -> None:
    assert torch.allclose(pooled(torch.ones(1, 49, 3), (7, 7), (4, 4)), torch.ones(1, 16, 3))
    rows = torch.arange(7.0).repeat_interleave(7).view(1, 49, 1)
    assert (pooled(rows, (7, 7), (4, 4)).view(4, 4).diff(dim=0) > 0).all()


def test_a_coarser_teacher_is_interpolated() -> None:
    rows = torch.arange(2.0).repeat_interleave(2).view(1, 4, 1)
    assert torch.allclose(pooled(rows, (2, 2), (4, 4)).view(4, 4)[:, 0], torch.tensor([0, 0.25, 0.75, 1]))


def test_the_same_grid_is_left_alone() -> None:
    x = features((3, 3))
    assert pooled(x, (3, 3), (3, 3)) is x


def test_no_gradient_reaches_the_teacher() -> None:
    a, b = features((2, 2)).requires_grad_(), features((4, 4)).requires_grad_()
    distillation_loss(a, b, (2, 2), (4, 4)).backward()
    assert a.grad is not None and b.grad is None


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="have 6 dims, the teacher's 5"):
        distillation_loss(features((2, 2)), features((2, 2))[..., :5], (2, 2), (2, 2))
