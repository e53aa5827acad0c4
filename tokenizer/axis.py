"""What the palette asks of colours, without a solver or a sort for each patch: the principal axis and the median.

`torch.linalg.eigh` and `torch.median` walk through small problems one by one (2.9 ms for 4,096 matrices and 8.7 ms for 768 rows of 1,024
on one core); a closed form over all of them at once takes 0.8 ms, numpy's vectorised selection 0.7 ms.
"""

import math

import numpy as np
import torch
from torch import Tensor


def principal_axis(scatter: Tensor) -> Tensor:
    """Symmetric, positive [..., 3, 3] → unit vectors [..., 3] along which they are largest; the component that is largest in size is
    positive. Where eigenvalues share the first place, some vector that is as good.

    Eigenvalues by the trigonometric form (Smith 1961, doi:10.1145/355578.366316), in fp64. Then, as A's other parts vanish
    (Cayley–Hamilton), (A − λ₂)(A − λ₃) = (λ₁ − λ₂)(λ₁ − λ₃) v vᵀ, whose columns are v; the one with the largest diagonal is longest."""
    x, y, z, xy, xz, yz = (scatter[..., i, j].double() for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)))
    trace = (x + y + z).clamp_min(1e-300)
    x, y, z, xy, xz, yz = (each / trace for each in (x, y, z, xy, xz, yz))  # eigenvalues now sum to 1
    dx, dy, dz = x - 1 / 3, y - 1 / 3, z - 1 / 3
    off = xy * xy + xz * xz + yz * yz
    spread = ((dx * dx + dy * dy + dz * dz + 2 * off) / 6).sqrt().clamp_min(1e-100)
    det = dx * (dy * dz - yz * yz) - xy * (xy * dz - yz * xz) + xz * (xy * yz - dy * xz)
    angle = (det / (2 * spread**3)).clamp(-1, 1).acos() / 3
    last = 1 / 3 + 2 * spread * (angle + 2 * math.pi / 3).cos()
    second = 2 / 3 - 2 * spread * angle.cos() - last
    both, product = second + last, second * last  # A² − (λ₂ + λ₃) A + λ₂ λ₃
    line = (x * x + xy * xy + xz * xz - both * x + product, y * y + xy * xy + yz * yz - both * y + product,
            z * z + xz * xz + yz * yz - both * z + product, xy * (x + y - both) + xz * yz, xz * (x + z - both) + xy * yz,
            yz * (y + z - both) + xy * xz)
    plane = (x - last, y - last, z - last, xy, xz, yz)
    corner = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)  # the last axis
    is_line, is_plane = line[0] + line[1] + line[2] > 1e-12, 1 - 3 * last > 1e-6  # or rounding
    xx, yy, zz, xy, xz, yz = (torch.where(is_line, a, torch.where(is_plane, b, c)) for a, b, c in zip(line, plane, corner, strict=True))
    columns = torch.stack([torch.stack(column, -1) for column in ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))], -2)
    which = columns.diagonal(dim1=-2, dim2=-1).argmax(-1)
    axis = columns.gather(-2, which[..., None, None].expand(*which.shape, 1, 3)).squeeze(-2)
    return (axis / axis.norm(dim=-1, keepdim=True)).to(scatter.dtype)


def lower_median(x: Tensor) -> Tensor:
    """[..., n] → [...], the element that `torch.median` gives: of an even number, the lower of the middle two."""
    if x.device.type != "cpu":
        return x.median(-1).values
    middle = (x.shape[-1] - 1) // 2
    return torch.from_numpy(np.partition(x.numpy(), middle, -1)[..., middle].copy())
