"""Perturbed codes are near ones, as many as asked for, and a picture's own affair."""

import torch

from tokenizer.perturb import perturb_codes

CODES = torch.randint(50, (40, 2, 8, 8), generator=torch.Generator().manual_seed(0))
NEAR = (torch.arange(50)[:, None] + torch.tensor([[[1, 2, 3]], [[21, 22, 23]]])) % 50  # [M, K, δ]


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_a_share_of_the_codes_of_a_share_of_the_pictures_goes_to_a_neighbour() -> None:
    out = perturb_codes(CODES, NEAR, alpha=0.3, beta=0.5, generator=torch.Generator().manual_seed(1))
    moved = out != CODES
    touched = moved.flatten(1).any(1)
    assert 10 <= touched.sum() <= 30 and abs(moved[touched].float().mean() - 0.3) < 0.03
    away = (out - CODES) % 50
    assert set(away[:, 0].unique().tolist()) == {0, 1, 2, 3} and set(away[:, 1].unique().tolist()) == {0, 21, 22, 23}


def test_with_a_generator_a_picture_its_codes_do_not_depend_on_those_beside_it() -> None:
    together = perturb_codes(CODES, NEAR, 0.5, 0.5, seeded(40))
    apart = [perturb_codes(CODES[part], NEAR, 0.5, 0.5, seeded(40)[part]) for part in (slice(0, 7), slice(7, 40))]
    assert torch.equal(together, torch.cat(apart)) and not torch.equal(together, CODES)
