"""A discriminator judges places and knows neither batch nor rank; its frozen tower stays frozen; augmentation is exact and seeded."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tokenizer.adversarial import discriminator_hinge
from tokenizer.discriminator import DRAWS, FeatureDiscriminator, PatchDiscriminator, augment, cut_out, recolour, translate
from tokenizer.semantic import TowerConfig, vision_tower


def pictures(b: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def drawn(b: int, count: int = DRAWS, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, count, generator=torch.Generator().manual_seed(seed))


def feature_discriminator() -> tuple[nn.Module, FeatureDiscriminator]:
    """On three layers of a real tower, 16 tokens of 32 channels each."""
    torch.manual_seed(0)
    tower = vision_tower(TowerConfig(width=32, heads=2)).eval().requires_grad_(False)

    def layers(x: torch.Tensor) -> list[torch.Tensor]:
        found: Any = tower.forward_intermediates(x, indices=[0, 1, 2], output_fmt="NLC", intermediates_only=True)
        return found["image_intermediates"]

    return tower, FeatureDiscriminator(layers, [32, 32, 32])


@pytest.mark.parametrize(("side", "layers", "places"), [(32, 1, 14), (32, 2, 6), (32, 3, 2), (256, 3, 30)])
def test_a_patch_discriminator_fits_its_picture(side: int, layers: int, places: int) -> None:
    assert PatchDiscriminator(8, layers)(pictures(1, side)).shape == (1, places**2)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_patch_is_as_large_as_it_says(layers: int) -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(4, layers)
    for number, block in enumerate(judge.net):
        if isinstance(block, nn.GroupNorm):
            judge.net[number] = nn.Identity()  # its statistics are the whole picture's
    x = pictures(1, 160).requires_grad_()
    logits = judge(x)
    logits[0, logits.shape[1] // 2 + round(logits.shape[1]**0.5) // 2].backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0) > 0
    assert [int(seen.any(dim).sum()) for dim in (0, 1)] == [9 * 2**layers - 2] * 2


def test_the_patch_discriminator_of_the_paper_has_its_parameters() -> None:
    convolutions = [m for m in PatchDiscriminator().net if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.stride[0]) for m in convolutions] == [(64, 2), (128, 2), (256, 2), (512, 1), (1, 1)]


def test_a_pictures_logits_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    for judge in (PatchDiscriminator(8, 2), feature_discriminator()[1]):
        together = judge(pictures())
        alone = torch.cat([judge(x[None]) for x in pictures()])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_judge_has_no_buffers_that_could_part_between_ranks() -> None:
    assert not list(PatchDiscriminator().buffers()) and not list(feature_discriminator()[1].buffers())


def test_a_picture_too_small_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"23, 32.*3 layers.*24 px.*discriminator\.layers"):
        PatchDiscriminator(8, 3)(torch.zeros(1, 3, 23, 32))


def test_features_give_a_logit_a_token_and_layer() -> None:
    assert feature_discriminator()[1](pictures()).shape == (3, 3 * 16)


def test_gradients_pass_the_frozen_tower_and_leave_it_alone() -> None:
    tower, judge = feature_discriminator()
    before = copy.deepcopy(tower.state_dict())
    images = pictures().requires_grad_()
    (-judge(images).mean()).backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in judge.heads.parameters() if p.ndim > 1)
    torch.optim.SGD(judge.parameters(), 0.1).step()
    assert all(torch.equal(value, before[name]) and tower.get_parameter(name).grad is None for name, value in tower.named_parameters())


def test_the_towers_weights_are_not_the_discriminators() -> None:
    tower = nn.Sequential(nn.Conv2d(3, 8, 4, 4)).eval().requires_grad_(False)
    judge = FeatureDiscriminator(lambda x: [tower(x)], [8], maps=True)
    module = FeatureDiscriminator(Maps(tower), [8], maps=True)
    assert list(judge.state_dict()) == list(module.state_dict()) == list(dict(judge.named_parameters()))
    assert all(name.startswith("heads.") for name in judge.state_dict())
    assert module.train().tower.training is False  # type: ignore[attr-defined]
    assert judge(pictures()).shape == (3, 64)


class Maps(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.inner = tower
        self.eval()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.inner(x)]


def test_a_tower_in_training_or_of_other_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"requires_grad_\(False\)"):
        FeatureDiscriminator(Maps(nn.Conv2d(3, 8, 4, 4)), [8], maps=True)
    tower = nn.Conv2d(3, 8, 4, 4).eval().requires_grad_(False)
    for dims, maps in (([16], True), ([8], False), ([8, 8], True)):
        with pytest.raises(ValueError, match=r"\[3, 8, 8, 8\].*dims or maps"):
            FeatureDiscriminator(lambda x: [tower(x)], dims, maps)(pictures())


def test_a_few_steps_teach_either_judge_to_tell_sharp_from_blurred() -> None:
    def blurred(seed: int) -> torch.Tensor:
        return nn.functional.avg_pool2d(pictures(8, seed=seed), 3, 1, 1)

    for judge in (PatchDiscriminator(8, 2), feature_discriminator()[1]):
        optimizer = torch.optim.AdamW(judge.parameters(), 5e-3)
        for step in range(40):
            optimizer.zero_grad()
            discriminator_hinge(judge(pictures(8, seed=step)), judge(blurred(step + 100))).backward()
            optimizer.step()
        assert judge(pictures(8, seed=200)).mean() > judge(blurred(201)).mean() + 0.5


def test_augmentation_follows_its_draws_and_moves_every_picture_by_itself() -> None:
    images, draws = pictures(1).expand(6, -1, -1, -1), drawn(6)
    once = augment(images, draws)
    assert torch.equal(once, torch.cat([augment(images[n:n + 1], draws[n:n + 1]) for n in range(6)]))
    assert len({x.sum().item() for x in once}) == 6
    for n in range(DRAWS):  # each number counts
        moved = draws.clone()
        moved[:, n] = (moved[:, n] + 0.5) % 1
        assert not torch.equal(augment(images, moved), once)


def test_augmentation_passes_gradients_to_what_stays_in_the_picture() -> None:
    images = pictures(8).requires_grad_()
    augment(images, drawn(8)).square().sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and (images.grad != 0).flatten(1).any(1).all()
    for change in (translate, cut_out):
        x = torch.ones(8, 3, 16, 16, requires_grad=True)
        out = change(x, drawn(8, 2))
        grad, = torch.autograd.grad(out.sum(), x)
        assert set(grad.unique().tolist()) == {0.0, 1.0} and torch.equal(grad.sum((1, 2, 3)), out.sum((1, 2, 3)))


def test_translation_shifts_by_whole_pixels_at_most_an_eighth() -> None:
    images = pictures(99, 16)
    shifts = [[(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if torch.equal(after, shifted(before, dy, dx))]
              for before, after in zip(images, translate(images, drawn(99, 2)), strict=True)]
    assert all(len(found) == 1 for found in shifts) and len({found[0] for found in shifts}) > 20


def shifted(x: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Pixel (y, x) shows what was at (y + dy, x + dx)."""
    x = x.roll((-dy, -dx), (1, 2))
    for dim, by in ((1, dy), (2, dx)):
        x.narrow(dim, x.shape[dim] - by if by > 0 else 0, abs(by)).zero_()
    return x


def test_cut_out_greys_one_rectangle_and_nothing_else() -> None:
    images = pictures(64) + 2  # nothing is 0 before
    heights: list[int] = []
    for before, after in zip(images, cut_out(images, drawn(64, 2)), strict=True):
        hole = (after == 0).all(0)
        rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
        assert hole.sum() == len(rows) * len(columns) and torch.equal(after[:, ~hole], before[:, ~hole])
        heights.append(len(rows))
    assert max(heights) == 16 and min(heights) >= 8  # at a corner a quarter of it is in the picture


def test_recolouring_keeps_what_it_should_and_stays_in_its_ranges() -> None:
    images = pictures(256)
    out = recolour(images, drawn(256, 3))
    shift = out.mean((1, 2, 3)) - images.mean((1, 2, 3))  # saturation and contrast keep the mean
    assert shift.abs().max() <= 0.5 and shift.std() > 0.2
    grey = images.mean(1, keepdim=True).expand_as(images)
    out = recolour(grey, drawn(256, 3))
    assert (out - out.mean(1, keepdim=True)).abs().max() < 1e-5  # saturation has nothing to do on grey
    contrast = out.std((1, 2, 3)) / grey.std((1, 2, 3))
    assert contrast.min() >= 0.5 - 1e-4 and contrast.max() <= 1.5 + 1e-4
