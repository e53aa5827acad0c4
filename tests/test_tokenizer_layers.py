"""Patches survive their closed forms: two-coloured ones exactly, any in the linear form with all dims."""

import torch

from tokenizer.layers import LinearPatches, PalettePatches, PixelDecoder, patches_of, unpatch


def two_coloured(b: int = 3) -> torch.Tensor:
    """Pictures of one ground with soft-edged figures, one figure colour a patch: [b, 3, 16, 16]"""
    torch.manual_seed(0)
    ground, figure = torch.rand(b, 3, 1, 1) * 2 - 1, torch.rand(b, 3, 2, 2) * 2 - 1
    pattern = (torch.rand(b, 1, 16, 16) * 3 - 1.5).clamp(0, 1)
    return ground + (figure.repeat_interleave(8, 2).repeat_interleave(8, 3) - ground) * pattern


def test_patches_and_back() -> None:
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(unpatch(patches_of(x, 8).view(-1, 3, 64), (2, 3)), x)


def test_two_coloured_patches_survive_the_palette_form() -> None:
    x, patches = two_coloured(), PalettePatches(8)
    assert torch.allclose(patches.decode(patches(x), (2, 2)), x, atol=1e-4)


def test_a_pattern_does_not_depend_on_the_colours() -> None:
    pattern = torch.zeros(1, 1, 16, 16)
    pattern[..., 9:14, 10:15] = 1
    pattern[..., 9, 10:15] = 0.4
    patches, latents = PalettePatches(8), []
    for ground, figure in ((1.0, -0.5), (-0.9, 0.8)):
        latents.append(patches((ground + (figure - ground) * pattern).expand(1, 3, 16, 16).contiguous())[3])
    assert torch.allclose(latents[0][6:], latents[1][6:], atol=1e-5)
    assert not torch.allclose(latents[0][:6], latents[1][:6], atol=0.1)


def test_a_plain_patch_has_one_colour_and_no_pattern() -> None:
    latents = PalettePatches(8)(torch.full((1, 3, 8, 8), 0.3))
    assert torch.allclose(latents[0, :6], torch.full((6,), 0.3)) and latents[0, 6:].abs().max() == 0


def test_the_linear_form_with_all_dims_is_exact() -> None:
    x, patches = torch.randn(40, 3, 4, 4), LinearPatches(4, (48,))
    patches.start(patches_of(x, 4))
    assert torch.allclose(patches.decode(patches(x), (1, 1)), x, atol=1e-4)


def test_the_linear_form_keeps_the_most_variance() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 3, 4, 4) * torch.linspace(0.1, 2, 4)
    patches = LinearPatches(4, (12,))
    patches.start(patches_of(x, 4))
    error = (patches.decode(patches(x), (1, 1)) - x).square().mean()
    random = LinearPatches(4, (12,))
    random.basis.copy_(torch.linalg.qr(torch.randn(48, 12))[0].T)
    assert error < (random.decode(random(x), (1, 1)) - x).square().mean() / 2


def test_the_pixel_decoder_starts_as_the_identity() -> None:
    decoder, x = PixelDecoder(8, 4, channels=8, blocks=2), torch.randn(2, 3, 16, 16)
    assert torch.equal(decoder(x, torch.randn(2, 4, 2, 2)), x)
