"""LPIPS is equation 1 over the given weights, and never a NaN; edges see edges."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tokenizer.perceptual import NETWORK, Backbone, Perceptual, edges

TAPS: dict[Backbone, tuple[int, ...]] = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
"""torchvision's index of the activations that are compared."""


def layers(backbone: Backbone) -> Any:
    """torchvision's convolutions, without numbers in them."""
    from torchvision import models

    with torch.device("meta"):
        return getattr(models, NETWORK[backbone])(weights=None).features


def random_weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"features.{name}": torch.randn(p.shape, generator=generator) * (2 / p[0].numel())**0.5 * (p.ndim == 4)
            for name, p in layers(backbone).named_parameters()}


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(random_weights("vgg"), path)
    return path


@pytest.fixture(scope="module")
def vgg(vgg_file: Path) -> Perceptual:
    return Perceptual.load("vgg", vgg_file)


def pictures(side: int = 32, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.rand(2, 2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return a, b


def by_the_package(backbone: Backbone, weights: dict[str, torch.Tensor]) -> Any:
    """The lpips package's own module and forward, with the same backbone."""
    import lpips  # type: ignore[import-untyped]

    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        net = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
    heads = torch.load(Path(lpips.__file__).parent / f"weights/v0.1/{backbone}.pth", "cpu", weights_only=True)
    net.load_state_dict(heads, strict=False, assign=True)
    for number in range(1, 6):
        for index, layer in getattr(net.net, f"slice{number}").named_children():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight = torch.nn.Parameter(weights[f"features.{index}.weight"])
                layer.bias = torch.nn.Parameter(weights[f"features.{index}.bias"])
    return net


def test_lpips_is_zero_for_the_same_picture_positive_for_another_and_symmetric(vgg: Perceptual) -> None:
    a, b = pictures()
    assert torch.equal(vgg(a, a), torch.zeros(2))
    assert (vgg(a, b) > 1e-3).all()
    torch.testing.assert_close(vgg(a, b), vgg(b, a))


def test_lpips_grows_as_a_picture_is_mixed_with_another(vgg: Perceptual) -> None:
    a, b = pictures()
    mixed = torch.stack([vgg(a, a.lerp(b, share)) for share in (0.1, 0.3, 0.6, 1.0)])
    assert (mixed.diff(dim=0) > 0).all()


def test_lpips_with_vgg_is_the_packages_number(vgg: Perceptual) -> None:
    a, b = pictures()
    with torch.no_grad():
        torch.testing.assert_close(vgg(a, b), by_the_package("vgg", random_weights("vgg"))(a, b).flatten(), rtol=1e-5, atol=1e-7)


def test_lpips_with_alex_is_the_packages_number_and_reads_safetensors(tmp_path: Path) -> None:
    weights, (a, b) = random_weights("alex"), pictures(47)
    save_file(weights, tmp_path / "alexnet.safetensors")
    ours = Perceptual.load("alex", tmp_path / "alexnet.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(ours(a, b), by_the_package("alex", weights)(a, b).flatten(), rtol=1e-5, atol=1e-7)


def test_lpips_is_equation_1_over_torchvisions_layers(vgg: Perceptual) -> None:
    weights, network = random_weights("vgg"), layers("vgg")
    for name, value in weights.items():
        network.get_submodule(name.split(".")[1])._parameters[name.split(".")[2]] = torch.nn.Parameter(value)
    shift, scale = (torch.tensor(x).view(3, 1, 1) for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    a, b = pictures()
    for i in range(2):
        x, y, expected = *((p[i:i + 1] - shift) / scale for p in (a, b)), 0.0
        with torch.no_grad():
            for index, layer in enumerate(network[:30]):
                x, y = layer(x), layer(y)
                if index in TAPS["vgg"]:
                    head = vgg.net.lins[TAPS["vgg"].index(index)].model[1].weight.view(-1, 1)
                    for h in range(x.shape[2]):
                        for w in range(x.shape[3]):
                            difference = F.normalize(x[0, :, h, w], dim=0) - F.normalize(y[0, :, h, w], dim=0)
                            expected += float((head[:, 0] * difference.square()).sum()) / x[0, 0].numel()
        assert vgg(a, b)[i].item() == pytest.approx(expected, rel=1e-4)


def test_lpips_teaches_the_picture_and_not_itself(vgg: Perceptual) -> None:
    a, b = pictures()
    a.requires_grad_()
    vgg(a, b).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in vgg.parameters())


def test_lpips_has_a_finite_gradient_where_every_channel_is_silent() -> None:
    weights = {name: value - 100 * (value.ndim == 1) for name, value in random_weights("alex").items()}
    a, b = pictures()
    a.requires_grad_()
    Perceptual("alex", weights)(a, b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_lpips_is_the_same_in_training_and_under_autocast(vgg: Perceptual) -> None:
    a, b = pictures()
    expected = vgg(a, b)
    vgg.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vgg(a, b), expected)


def test_loading_lpips_draws_no_random_number(vgg_file: Path) -> None:
    before = torch.get_rng_state()
    Perceptual.load("vgg", vgg_file)
    assert torch.equal(torch.get_rng_state(), before)


def test_lpips_without_weights_says_what_to_give_or_choose(tmp_path: Path, vgg: Perceptual) -> None:
    with pytest.raises(ValueError, match=r'^perceptual="vgg" has no weights: set perceptual_weights to .*vgg16.*"edges"$'):
        Perceptual.load("vgg", None)
    with pytest.raises(FileNotFoundError, match=r"no .*absent\.pth.*alexnet.*perceptual_weights"):
        Perceptual.load("alex", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"no torchvision vgg16: features\.0\.weight has to be \[64, 3, 3, 3\] and is \[64, 3, 11, 11\]"):
        Perceptual("vgg", random_weights("alex"))
    with pytest.raises(ValueError, match="image_size"):
        vgg(torch.zeros(1, 3, 15, 32), torch.zeros(1, 3, 15, 32))


def test_edges_are_the_mean_gradient_differences_of_each_scale() -> None:
    a, b = pictures(16)
    total = torch.zeros(2)
    for scale in (1, 2, 4):
        x, y = (p.view(2, 3, 16 // scale, scale, 16 // scale, scale).mean((3, 5)) for p in (a, b))
        total += ((x[..., 1:] - x[..., :-1]) - (y[..., 1:] - y[..., :-1])).abs().mean((1, 2, 3))
        total += ((x[..., 1:, :] - x[..., :-1, :]) - (y[..., 1:, :] - y[..., :-1, :])).abs().mean((1, 2, 3))
    torch.testing.assert_close(edges(a, b), total / 3)


def test_edges_see_polarity_and_blur_but_no_even_offset() -> None:
    a, _ = pictures()
    blurred = F.avg_pool2d(a, 3, 1, 1)
    assert (edges(a, -a) > edges(a, blurred)).all() and (edges(a, blurred) > 0.1).all()
    assert edges(a, a + 0.3).max() < 1e-6


def test_edges_refuse_a_picture_without_three_scales() -> None:
    edges(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="image_size"):
        edges(torch.zeros(1, 3, 7, 8), torch.zeros(1, 3, 7, 8))
