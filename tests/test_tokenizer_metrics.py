"""Measures agree with the slow obvious version, with the libraries that others measure by, and with closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenizer.metrics import (
    Moments,
    agreement,
    chance_agreement,
    code_counts,
    code_use,
    frechet_distance,
    linear_probe,
    ms_ssim,
    psnr,
    squared_error,
    ssim,
    zero_shot,
)


def pictures(side: int, count: int = 2, noise: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth ramps with a saturated corner, and the same with noise: uint8 [count, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 255, side)
    a = torch.stack([torch.stack([ramp.expand(side, side), ramp.expand(side, side).T, ramp.flip(0).expand(side, side)])] * count)
    a[..., :side // 3, :side // 3] = 255
    b = a + torch.randint(-noise, noise + 1, a.shape, generator=generator)
    return a.byte(), b.clamp(0, 255).byte()


def moments(x: Tensor) -> Moments:
    out = Moments.empty(x.shape[1])
    out.add(x)
    return out


# Pixels -----------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_error_and_an_exact_picture_is_100_db() -> None:
    a, b = pictures(16)
    x, y = a.numpy().astype(float), b.numpy().astype(float)
    assert squared_error(a, b).tolist() == pytest.approx([np.square(p - q).mean() for p, q in zip(x, y, strict=True)])
    assert psnr(squared_error(a, b).mean().item()) == pytest.approx(10 * np.log10(255**2 / np.square(x - y).mean()))
    assert psnr(squared_error(a, a).mean().item()) == 100 and psnr(255.0**2) == 0


def test_psnr_over_all_pixels_is_never_above_the_mean_over_pictures() -> None:
    for seed in range(5):
        errors = torch.rand(9, generator=torch.Generator().manual_seed(seed)).square() * 900 + 0.1
        assert psnr(errors.mean().item()) <= np.mean([psnr(e) for e in errors.tolist()])


def test_squares_of_uint8_do_not_wrap() -> None:
    black, white = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert squared_error(black, white).item() == squared_error(white, black).item() == 255**2


@pytest.mark.parametrize("noise", [0, 1, 40, 200])
def test_ssim_is_torchmetrics_in_double_precision(noise: int) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    a, b = pictures(37, noise=noise)
    expected = theirs(a.double(), b.double(), data_range=255.0, reduction="none")
    assert isinstance(expected, Tensor) and torch.allclose(ssim(a, b), expected, atol=1e-12, rtol=0)


def test_ssim_at_one_position_is_equation_13() -> None:
    a, b = pictures(11)
    x, y = a[0, 0].double(), b[0, 0].double()
    taps = torch.exp(-(torch.arange(11.0).double() - 5).square() / 4.5)
    window = torch.outer(taps, taps) / taps.sum()**2
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy, cov = (window * (x - mx)**2).sum(), (window * (y - my)**2).sum(), (window * (x - mx) * (y - my)).sum()
    by_hand = (2 * mx * my + 6.5025) * (2 * cov + 58.5225) / ((mx**2 + my**2 + 6.5025) * (vx + vy + 58.5225))

    from tokenizer.metrics import _similarity  # pyright: ignore[reportPrivateUsage]
    assert torch.allclose(_similarity(a.double(), b.double())[0][0, 0, 5, 5], by_hand)


def test_twice_the_range_would_flatter() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as theirs

    a, b = pictures(32, noise=60)
    wrong = theirs(a.double(), b.double(), data_range=510.0, reduction="none")
    assert isinstance(wrong, Tensor) and (wrong > ssim(a, b) + 0.05).all()


def test_multiscale_ssim_is_torchmetrics_and_none_where_its_window_does_not_fit() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as theirs

    a, b = pictures(177, count=1)
    mine = ms_ssim(a, b)
    assert mine is not None
    assert torch.allclose(mine, theirs(a.double(), b.double(), data_range=255.0, reduction="none"), atol=1e-7)
    assert ms_ssim(*pictures(175)) is None


def test_ssim_of_pictures_below_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SSIM of 5x5 px: .* 6 px"):
        ssim(*pictures(5))


# Distributions ----------------------------------------------------------------------------------------------------


def test_streamed_and_merged_moments_are_those_of_the_whole() -> None:
    x = torch.randn(50, 4) * torch.tensor([1.0, 2.0, 3.0, 100.0]) + 7
    streamed, other = Moments.empty(4), Moments.empty(4)
    for part in x[:30].split(7):
        streamed.add(part)
    other.add(x[30:])
    streamed.merge(other)
    mean, covariance = streamed.gaussian()
    assert np.allclose(mean, x.double().mean(0)) and np.allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def test_frechet_distance_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = torch.randn(200, 12).double(), torch.randn(150, 12).double() @ torch.randn(12, 12).double() + 0.3
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)["frechet_inception_distance"]
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(theirs, rel=1e-9)


def test_frechet_distance_in_one_dimension_is_that_of_means_and_deviations() -> None:
    a, b = torch.randn(30, 1), torch.randn(40, 1) * 3 + 2
    expected = (a.double().mean() - b.double().mean())**2 + (a.double().std() - b.double().std())**2
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected.item())


def test_frechet_distance_is_symmetric_and_zero_of_itself_even_with_fewer_samples_than_features() -> None:
    a, b = moments(torch.randn(10, 40)), moments(torch.randn(10, 40) + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10) and frechet_distance(a, b) > 10
    assert frechet_distance(a, a) < 1e-6


def test_one_picture_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="covariance of 1 pictures"):
        frechet_distance(moments(torch.randn(1, 3)), moments(torch.randn(5, 3)))


# Codes ------------------------------------------------------------------------------------------------------------


def test_counts_of_batches_add_up_to_those_of_a_loop() -> None:
    codes = torch.randint(6, (5, 3, 2, 4), dtype=torch.int32)
    slow = torch.zeros(3, 6, dtype=torch.long)
    for picture in codes:
        for book in range(3):
            for code in picture[book].flatten():
                slow[book, code] += 1
    assert torch.equal(code_counts(codes[:2], 6) + code_counts(codes[2:], 6), slow)


def test_perplexity_is_the_number_of_equally_frequent_codes() -> None:
    counts = torch.tensor([[5, 5, 5, 5, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0, 0, 0]])
    use = code_use(counts)
    assert [book["usage"] for book in use["books"]] == [0.5, 0.125, 0.25]
    skewed = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert [book["perplexity"] for book in use["books"]] == pytest.approx([4, 1, skewed])
    assert use["usage"] == pytest.approx(0.875 / 3) and use["perplexity"] == pytest.approx((5 + skewed) / 3) and use["positions"] == 20


def test_a_coarse_code_agrees_where_all_it_covers_has_its_code() -> None:
    coarse = torch.randint(4, (2, 2, 2, 3))
    fine = coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)
    assert agreement(fine, coarse).whole.tolist() == [1, 1] and agreement(fine, fine).books.unique().tolist() == [1]
    fine[0, 1, 0, 0] += 1
    found = agreement(fine, coarse)
    assert found.books[0].tolist() == [1, 23 / 24] and found.whole.tolist() == [23 / 24, 1]


def test_chance_is_the_agreement_of_shuffled_codes() -> None:
    codes = torch.randint(8, (400, 2, 4, 4)).square() // 8
    counts, shuffled = code_counts(codes, 8), codes[torch.randperm(400)]
    assert chance_agreement(counts, counts) == pytest.approx(agreement(codes, shuffled).books.mean(0).tolist(), abs=0.03)


# Meaning ----------------------------------------------------------------------------------------------------------


def test_zero_shot_picks_the_class_of_the_same_direction() -> None:
    classes = torch.randn(5, 16)
    labels = [0, 3, 3, 4, 1, 2]
    assert zero_shot(classes[labels] * torch.rand(6, 1).add(0.1), classes, labels) == 1
    assert zero_shot(classes[labels], classes, [0, 3, 3, 4, 1, 0]) == pytest.approx(5 / 6)


def test_the_probe_finds_what_is_linear_whatever_the_scale_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    labels = (x[:, 2] > 0.2).long().tolist()
    found = linear_probe(x, labels)
    assert found > 0.9 and linear_probe(x * torch.tensor([1, 9, 1e3, 1, 1e-3, 1]) + 5, labels) == found
    noise = torch.randint(4, (200,), generator=generator).tolist()
    assert linear_probe(x, noise) < 0.5


def test_the_probe_is_ridge_regression_solved_as_least_squares() -> None:
    x, labels = torch.randn(40, 3).double(), torch.arange(40).remainder(3).tolist()
    tests = np.arange(40) % 5 == 4
    train = x.numpy()[~tests]
    mean, deviation = train.mean(0), train.std(0, ddof=1)
    z, y = (train - mean) / deviation, np.eye(3)[np.array(labels)[~tests]]
    rows = np.concatenate([z, np.sqrt(0.01 * len(z)) * np.eye(3)])
    weight = np.linalg.lstsq(rows, np.concatenate([y - y.mean(0), np.zeros((3, 3))]), rcond=None)[0]
    chosen = ((x.numpy()[tests] - mean) / deviation @ weight + y.mean(0)).argmax(1)
    assert linear_probe(x, labels) == pytest.approx((chosen == np.array(labels)[tests]).mean())


def test_a_probe_without_test_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="5 or more"):
        linear_probe(torch.randn(4, 2), [0, 1, 0, 1])
