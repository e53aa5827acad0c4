"""Hinge, LeCam and the adaptive weight are their formulas, and the same number on any number of ranks."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmllm.launch import join, launch
from tokenizer.adversarial import LeCam, adaptive_weight, discriminator_hinge, gan_weight, generator_hinge
from tokenizer.discriminator import DRAWS, PatchDiscriminator, augment


def logits(steps: int = 5, seed: int = 0) -> torch.Tensor:
    """[steps, 2, b, n]: real and fake"""
    return torch.randn(steps, 2, 4, 9, generator=torch.Generator().manual_seed(seed)) + torch.tensor([0.8, -0.5]).view(2, 1, 1)


def test_the_hinge_is_what_is_missing_to_the_margin() -> None:
    real, fake = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[-2.0, 0.0, 0.5]])
    assert discriminator_hinge(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3) / 2)
    assert generator_hinge(fake).item() == pytest.approx(0.5)


def test_a_discriminator_that_is_sure_is_not_pushed_and_a_decoder_always_is() -> None:
    real, fake = torch.full((2, 3), 1.5, requires_grad=True), torch.full((2, 3), -1.5, requires_grad=True)
    discriminator_hinge(real, fake).backward()
    assert real.grad is not None and fake.grad is not None and not real.grad.any() and not fake.grad.any()
    generator_hinge(fake).backward()
    torch.testing.assert_close(fake.grad, torch.full((2, 3), -1 / 6))


def test_lecam_is_equation_3_with_a_mean_that_becomes_a_moving_average() -> None:
    lecam = LeCam(decay=0.7)
    alpha_real = alpha_fake = 0.0
    for n, (real, fake) in enumerate(logits(8)):
        weight = max(1 - 0.7, 1 / (n + 1))
        alpha_real += weight * (real.mean().item() - alpha_real)
        alpha_fake += weight * (fake.mean().item() - alpha_fake)
        squares = [*((x - alpha_fake)**2 for x in real.flatten().tolist()), *((x - alpha_real)**2 for x in fake.flatten().tolist())]
        assert lecam(real, fake).item() == pytest.approx(sum(squares) / 36, rel=1e-5)
    assert lecam.anchors.tolist() == pytest.approx([alpha_real, alpha_fake], rel=1e-5)


def test_lecam_pulls_on_the_logits_toward_the_other_sides_anchor() -> None:
    lecam, (real, fake) = LeCam(), logits(1)[0]
    real.requires_grad_()
    fake.requires_grad_()
    loss = lecam(real, fake)
    alpha_real, alpha_fake = lecam.anchors.tolist()
    lecam(real.detach() + 1, fake.detach())  # anchors move before the backward: not an error, and not felt
    loss.backward()
    assert not lecam.anchors.requires_grad
    torch.testing.assert_close(real.grad, 2 * (real.detach() - alpha_fake) / 36)
    torch.testing.assert_close(fake.grad, 2 * (fake.detach() - alpha_real) / 36)


def test_lecam_in_evaluation_moves_nothing() -> None:
    lecam = LeCam()
    lecam(*logits(1)[0])
    before = {name: value.clone() for name, value in lecam.state_dict().items()}
    lecam.eval()(*logits(1, seed=1)[0])
    assert all(torch.equal(value, before[name]) for name, value in lecam.state_dict().items())


def test_lecam_resumed_is_lecam_uninterrupted() -> None:
    whole, first, second = LeCam(), LeCam(), LeCam()
    expected = [whole(real, fake) for real, fake in logits(6)]
    for real, fake in logits(6)[:3]:
        first(real, fake)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(second(real, fake), value) for (real, fake), value in zip(logits(6)[3:], expected[3:], strict=True))


@pytest.mark.parametrize(("rec", "gen", "expected"), [(3.0, 2.0, 1.5), (0.001, 1.0, 0.015), (1.0, 0.0, 1e4), (5.0, 1e-7, 1e4)])
def test_the_adaptive_weight_is_the_ratio_of_two_pulls_within_limits(rec: float, gen: float, expected: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.nn.functional.normalize(torch.randn(6, generator=generator), dim=0) for _ in range(2))
    assert adaptive_weight(rec * p, gen * q).item() == pytest.approx(expected, rel=1e-4)


def scene() -> tuple[nn.Sequential, PatchDiscriminator, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
    return decoder, PatchDiscriminator(8, 2), torch.randn(4, 4, 24, 24), torch.rand(4, 3, 24, 24) * 2 - 1


def pulls(decoder: nn.Module, judge: nn.Module, latents: torch.Tensor, images: torch.Tensor,
          draws: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the picture, the gradients of both losses there, and the adversarial loss."""
    out = decoder(latents)
    leaf = out.detach().requires_grad_()
    g_rec, = torch.autograd.grad((leaf - images).square().mean(), leaf)
    gen = generator_hinge(judge(leaf if draws is None else augment(leaf, draws)))
    g_gen, = torch.autograd.grad(gen, leaf)
    return out, g_rec, g_gen, gen.detach()


def test_weighted_both_losses_pull_equally_at_the_picture_and_one_backward_pass_carries_both_on() -> None:
    decoder, judge, latents, images = scene()
    out, g_rec, g_gen, _ = pulls(decoder, judge, latents, images)
    weight = adaptive_weight(g_rec, g_gen)
    torch.testing.assert_close((weight * g_gen).norm(), g_rec.norm(), rtol=1e-3, atol=0.0)
    out.backward(g_rec + 0.4 * weight * g_gen)
    found = [p.grad for p in decoder.parameters()]
    out = decoder(latents)
    both = (out - images).square().mean() + 0.4 * weight * generator_hinge(judge(out))
    torch.testing.assert_close(found, list(torch.autograd.grad(both, list(decoder.parameters()))))
    assert all(p.grad is None for p in judge.parameters())


def test_the_gan_is_off_before_its_start_and_at_its_peak_after_the_warm_up() -> None:
    weights = [gan_weight(step, start=10, warmup=4, peak=0.5) for step in range(18)]
    assert weights[:10] == [0.0] * 10 and weights[14:] == [0.5] * 4
    assert weights[10:14] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [gan_weight(step, 3, 0, 0.4) for step in (2, 3, 4)] == [0.0, 0.4, 0.4]


def adversarial_steps() -> list[float]:
    """Three whole steps, as a training loop takes them → every loss on the way."""
    decoder, judge, latents, images = scene()
    lecam, generator = LeCam(), torch.Generator().manual_seed(3)
    optimizers = torch.optim.AdamW(decoder.parameters(), 1e-3), torch.optim.AdamW(judge.parameters(), 1e-3)
    seen: list[float] = []
    for step in range(3):
        draws = torch.rand(len(images), DRAWS, generator=generator)
        out, g_rec, g_gen, gen = pulls(decoder, judge, latents, images, draws)
        weight = gan_weight(step, 0, 2, 0.4) * adaptive_weight(g_rec, g_gen)
        for optimizer in optimizers:
            optimizer.zero_grad()
        out.backward(g_rec + weight * g_gen)
        optimizers[0].step()
        real, fake = judge(augment(images, draws)), judge(augment(out.detach(), draws))
        loss = discriminator_hinge(real, fake) + 0.001 * lecam(real, fake)
        loss.backward()
        optimizers[1].step()
        seen += [(out - images).square().mean().item(), gen.item(), weight.item(), loss.item()]
    return seen


def test_steps_of_both_sides_are_a_function_of_their_seeds() -> None:
    first = adversarial_steps()
    assert first == adversarial_steps() and first[8] < first[0]


def on_each_rank(folder: str) -> None:
    """Half of the batch each: anchors, LeCam and ω, as the rank sees them."""
    torch.set_num_threads(1)
    join()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(numbers(slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2))))


def numbers(part: slice) -> list[float]:
    lecam = LeCam(0.7)
    for real, fake in logits():
        lecam(real[part], fake[part])
    decoder, judge, latents, images = scene()
    _, g_rec, g_gen, _ = pulls(decoder, judge, latents[part], images[part])
    return [*lecam.anchors.tolist(), adaptive_weight(g_rec, g_gen).item()]


def test_two_ranks_find_the_numbers_of_one_with_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    launch("test_tokenizer_adversarial:on_each_rank", str(tmp_path), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == pytest.approx(numbers(slice(None)), rel=1e-4)
