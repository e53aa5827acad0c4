"""Nearest entries found block by block are those of all scores, and no pass of a quantizer holds anything like all scores."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenizer.kmeans import kmeans
from tokenizer.lookup_free import BinaryQuantizer
from tokenizer.nearest import nearest, neighbours
from tokenizer.quantize import Quantizer, QuantizerConfig, SharedIndexQuantizer, TextEmbedding
from tokenizer.residual import ResidualQuantizer

N, K = 4096, 8192
DENSE = N * K * 4
"""Bytes of one fp32 score for each latent and entry."""


class Held(TorchDispatchMode):
    """Bytes of the tensors made inside and still alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.meet((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self.meet(out, new=True)
        return out

    def meet(self, tree: Any, new: bool) -> None:
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)):
            if (address := storage.data_ptr()) not in self.known:
                size = storage.nbytes() if new else 0
                self.known.add(address)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def peak(do: Callable[[], Any]) -> int:
    with Held() as held:
        do()
    return held.peak


def shared(**settings: Any) -> SharedIndexQuantizer:
    config: dict[str, Any] = {"codebook_size": K, "semantic_dim": 8, "pixel_dims": (4,), "semantic_weights": (1.0,), "pixel_norm": True,
                              "semantic_table": "free", **settings}
    text = TextEmbedding(torch.randn(500, 12), torch.arange(500), 12) if config["semantic_table"] == "text" else None
    return SharedIndexQuantizer(QuantizerConfig(**config), text)


QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "free": shared, "ema": lambda: shared(semantic_table="ema", pixel_table="ema"),
    "simvq": lambda: shared(semantic_table="simvq", entropy_latents=256), "text": lambda: shared(semantic_table="text"),
    "all rows": lambda: shared(gradient="all"), "two books": lambda: shared(pixel_dims=(4, 4)),
    "residual": lambda: ResidualQuantizer(QuantizerConfig(kind="residual", codebook_size=K, depth=2, dims=12)),
    "bits": lambda: BinaryQuantizer(QuantizerConfig(kind="bsq", bits=(13,), entropy_latents=N)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_training_pass_holds_a_fraction_of_all_scores(name: str) -> None:
    """Forward, backward, usage and moving averages included."""
    quantizer = QUANTIZERS[name]().train()
    z = torch.randn(N, quantizer.dims, requires_grad=True)

    def step() -> None:
        out = quantizer(z)
        (out.entries.sum() + torch.stack(list(out.losses.values())).sum()).backward()
    assert peak(step) < DENSE / 4
    assert z.grad is not None


def test_starts_revivals_and_neighbours_hold_a_fraction_of_all_scores() -> None:
    quantizer, z = shared(), torch.randn(N, 12)
    quantizer.usage[:, ::2] = 0
    assert peak(lambda: quantizer.revive(z)) < DENSE / 4
    assert peak(lambda: kmeans(z, torch.ones(N), 5000, rounds=1, seed=0)) < DENSE / 4
    assert peak(lambda: quantizer.neighbours(4)) < K * K * 4 / 4


def test_what_is_held_is_seen() -> None:
    z, entries = torch.randn(N, 12, requires_grad=True), torch.randn(K, 12)
    assert peak(lambda: (z @ entries.T).softmax(-1).amax(-1).sum().backward()) >= 2 * DENSE


@pytest.mark.parametrize("size", [1, 30, 200, 1 << 20])
def test_blocks_do_not_change_what_is_nearest_or_which_of_equals_is_first(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("tokenizer.nearest.TILE", {"cpu": size})
    z, entries = (torch.randint(-2, 3, (n, 5)).float() for n in (70, 150))  # small whole numbers: scores are exact and often equal
    products = z @ entries.T
    assert torch.equal(nearest(z, entries), (products - entries.square().sum(-1) / 2).argmax(-1))
    assert torch.equal(nearest(z, entries, dot=True), products.argmax(-1))


def test_tiles_of_whole_rows_do_not_change_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = torch.randn(100, 5)
    whole = neighbours(entries, 3)
    monkeypatch.setattr("tokenizer.nearest.TILE", {"cpu": 1})
    assert torch.equal(neighbours(entries, 3), whole)


@pytest.mark.parametrize("bits", [1, 5, 9, 13])
def test_the_mean_choice_of_grouped_bits_is_that_of_every_latents_choices(bits: int) -> None:
    quantizer = BinaryQuantizer(QuantizerConfig(kind="bsq", bits=(bits,), entropy_temperature=0.3))
    point = F.normalize(torch.randn(30, bits), dim=-1)
    used = torch.zeros(())
    for some in torch.sigmoid(4 * quantizer.scale * point / 0.3).split(quantizer.GROUP, -1):
        chances = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * some.shape[1]).view(-1, some.shape[1])  # [2^bits, bits]
        p = (some[:, None] * chances + (1 - some[:, None]) * (1 - chances)).prod(-1)
        used = used + torch.special.entr(p.mean(0)).sum()
    assert torch.allclose(quantizer.entropies(point)[1], used, atol=1e-5)
