"""Distillation: what a codebook's semantic entries are decoded to is pulled towards a frozen teacher's features.

The target is 1 − cosine, patch by patch, as VQ-KD's (Peng et al. 2022, arXiv:2208.06366, equation 2): lengths of features differ between
teachers and mean little. Codes of a coarser scale stand for several patches of the teacher, so its features are averaged over each.

Letters: b batch, h w grid of the codes, gh gw grid of the teacher, c teacher width.
"""

import torch.nn.functional as F
from torch import Tensor


def pooled(features: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Features [b, gh · gw, c] on the grid (gh, gw) → [b, h · w, c] on the grid `to`: the mean of what each place covers, which is the
    teacher's own average pooling where the grids divide; bilinear where the teacher's is the coarser one."""
    if grid == to:
        return features
    x = features.mT.unflatten(-1, grid)  # [b, c, gh, gw]
    finer = grid[0] >= to[0] and grid[1] >= to[1]
    x = F.adaptive_avg_pool2d(x, to) if finer else F.interpolate(x, to, mode="bilinear")
    return x.flatten(2).mT


def distillation_loss(decoded: Tensor, teacher: Tensor, grid: tuple[int, int], teacher_grid: tuple[int, int]) -> Tensor:
    """decoded [b, h · w, c] on `grid`, teacher [b, gh · gw, c] on `teacher_grid` → mean of 1 − cosine, in fp32. No gradient reaches the
    teacher."""
    if decoded.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"decoded semantic features have {decoded.shape[-1]} dims, the teacher's {teacher.shape[-1]}: "
                         "give the semantic decoder the teacher's width")
    target = pooled(teacher.detach().float(), teacher_grid, grid)
    return 1 - F.cosine_similarity(decoded.float(), target, dim=-1).mean()
