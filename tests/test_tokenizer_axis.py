"""The closed forms of the palette agree with the solvers they stand for."""

import pytest
import torch

from tokenizer.axis import lower_median, principal_axis


def scatters(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(3000, 3, 64)
    if kind == "stretched":
        x = x * torch.rand(3000, 3, 1)**4
    if kind == "two colours":
        x = torch.randn(3000, 3, 1) * torch.randint(0, 2, (3000, 1, 64))
        x = x - x.mean(-1, keepdim=True)
    if kind == "pixels":
        x = (torch.randint(0, 256, (3000, 3, 64)) / 127.5 - 1) * torch.rand(3000, 1, 1)
    return x @ x.mT


@pytest.mark.parametrize("kind", ["round", "stretched", "two colours", "pixels"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_the_axis_is_the_last_eigenvector(kind: str, scale: float) -> None:
    a = scatters(kind) * scale
    values, vectors = torch.linalg.eigh(a.double())
    axis = principal_axis(a)
    clear = values[:, 2] - values[:, 1] > 1e-3 * values[:, 2]
    assert clear.float().mean() > 0.9 and axis.dtype == a.dtype
    assert (1 - (axis.double() * vectors[..., -1]).sum(-1).abs())[clear].max() < 1e-7  # eigh in fp32: 5e-7
    assert torch.allclose(axis.norm(dim=-1), torch.ones(len(axis)))
    along = torch.einsum("ni,nij,nj->n", axis.double(), a.double(), axis.double())
    assert (along >= values[:, 2] * (1 - 1e-6)).all()
    assert torch.equal(axis.gather(-1, axis.abs().argmax(-1, keepdim=True)).sign(), torch.ones(len(axis), 1))


@pytest.mark.parametrize("diagonal", [(0, 0, 0), (1, 1, 1), (1, 1, 0), (0, 1, 1), (2, 1, 1), (0, 0, 5), (1e-30, 0, 0)])
def test_where_eigenvalues_are_equal_the_axis_is_as_good_as_any(diagonal: tuple[float, float, float]) -> None:
    turn = torch.linalg.qr(torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(1)))[0]
    for q in (torch.eye(3)[None], turn):
        a = q @ torch.diag(torch.tensor(diagonal).float()) @ q.mT
        axis = principal_axis(a)
        assert torch.allclose(axis.norm(dim=-1), torch.ones(len(axis)))
        assert torch.allclose(torch.einsum("ni,nij,nj->n", axis, a, axis), torch.full((len(a),), float(max(diagonal))), rtol=1e-5, atol=0)


def test_batches_of_any_shape_are_taken() -> None:
    a = scatters("round")[:24]
    assert torch.equal(principal_axis(a.view(2, 3, 4, 3, 3)).view(24, 3), principal_axis(a))
    assert principal_axis(a[0]).shape == (3,)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 1023, 1024])
def test_the_median_is_torchs(count: int) -> None:
    x = torch.randint(0, 256, (4, 3, count)).float().div(127.5).sub(1)
    assert torch.equal(lower_median(x), x.median(-1).values)
    assert torch.equal(lower_median(x.movedim(0, 1)), x.movedim(0, 1).median(-1).values)
