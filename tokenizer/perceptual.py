"""How different two pictures look: a distance learned from people, and one of edges that needs no weights.

LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1) compares what a classification network sees. Its weights come from a path:
without them a recipe is refused, or says `perceptual="edges"` itself. Either is called with two batches and gives a number a picture.

Letters: b batch, H W picture.
"""

import warnings
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Backbone = Literal["vgg", "alex"]
NETWORK: dict[Backbone, str] = {"vgg": "vgg16", "alex": "alexnet"}
"""torchvision's names."""
SMALLEST: dict[Backbone, int] = {"vgg": 16, "alex": 31}
"""Side in px below which the last of the five layers has nothing left to look at."""


class Perceptual(nn.Module):
    """LPIPS, version 0.1: frozen, and fp32 under autocast too. "vgg" is the usual loss, "alex" the usual measure."""

    net: Any
    """The lpips package's own: colour scaling, backbone in five slices, a learned weight for each channel of each."""

    def __init__(self, backbone: Backbone, weights: dict[str, Tensor]) -> None:
        """weights: torchvision's state dict of the backbone; its classifier may be absent."""
        super().__init__()
        import lpips  # type: ignore[import-untyped]

        self.backbone: Backbone = backbone
        # on no device: 138 million random numbers are not drawn to be thrown away, and the global generator stays where it was
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # of an argument that torchvision renamed
            self.net = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
        heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth"
        self.net.load_state_dict(torch.load(heads, "cpu", weights_only=True), strict=False, assign=True)
        state: dict[str, Tensor] = {}
        for name, parameter in self.net.net.named_parameters():  # slice2.5.weight is torchvision's features.5.weight
            theirs = "features." + name.split(".", 1)[1]
            if theirs not in weights or weights[theirs].shape != parameter.shape:
                found = list(weights[theirs].shape) if theirs in weights else "missing"
                raise ValueError(f"the weights are no torchvision {NETWORK[backbone]}: {theirs} has to be {list(parameter.shape)} and is "
                                 f"{found}: set perceptual_weights to another file, or perceptual to what this one holds")
            state[name] = weights[theirs].float()
        self.net.net.load_state_dict(state, assign=True)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, backbone: Backbone, weights: Path | None) -> "Perceptual":
        """weights: a file with torchvision's state dict of vgg16 or alexnet, .safetensors or .pth."""
        what = f"torchvision's state dict of {NETWORK[backbone]} (.pth or .safetensors)"
        if weights is None:
            raise ValueError(f'perceptual="{backbone}" has no weights: set perceptual_weights to {what}, or choose perceptual="edges"')
        if not weights.is_file():
            raise FileNotFoundError(f'there is no {weights}, which perceptual="{backbone}" reads its weights from: '
                                    f'give {what} in perceptual_weights, or choose perceptual="edges"')
        safe = weights.suffix == ".safetensors"
        return cls(backbone, safetensors.torch.load_file(weights) if safe else torch.load(weights, "cpu", weights_only=True))

    def train(self, mode: bool = True) -> Self:
        """Always in evaluation: a surrounding `train()` would switch on the dropout of its heads."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[b, 3, H, W] in [-1, 1], twice → [b]"""
        if min(a.shape[-2:]) < SMALLEST[self.backbone]:
            raise ValueError(f'pictures of {tuple(a.shape[-2:])} px are too small for perceptual="{self.backbone}", which takes '
                             f'{SMALLEST[self.backbone]} px and more: raise image_size or choose perceptual="edges"')
        with torch.autocast(a.device.type, enabled=False):
            total = torch.zeros(len(a), device=a.device)
            layers = zip(*(self.net.net(self.net.scaling_layer(x.float())) for x in (a, b)), self.net.lins, strict=True)
            for seen_a, seen_b, head in layers:
                total = total + head((_unit(seen_a) - _unit(seen_b)).square()).mean((1, 2, 3))
            return total


def edges(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """L1 between the gradients of two pictures at `scales` scales, each half of the one before: [b, 3, H, W], twice → [b].

    The gradient difference loss (Mathieu et al. 2016, arXiv:1511.05440, equation 6, α = 1) but signed: theirs compares
    magnitudes, to which light on dark is dark on light. A colour that is off evenly has no edge: keep L1 or L2 beside it.
    """
    if min(a.shape[-2:]) >> (scales - 1) < 2:
        raise ValueError(f'pictures of {tuple(a.shape[-2:])} px are too small for perceptual="edges" at {scales} scales, which takes '
                         f"{2**scales} px and more: raise image_size")
    difference = a.float() - b.float()  # halving and gradients are linear: one pyramid instead of two
    total = torch.zeros(len(a), device=a.device)
    for scale in range(scales):
        difference = F.avg_pool2d(difference, 2) if scale else difference
        total = total + sum(difference.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (-1, -2))
    return total / scales


def _unit(x: Tensor) -> Tensor:
    """[b, c, h, w], each position of length 1. The package's 1e-10, moved under the root: where every channel is 0 its gradient
    is 0 · ∞, a NaN that would end the run."""
    return x * (x.square().sum(1, keepdim=True) + 1e-20).rsqrt()
