"""Settings of our quantizers give what the public code of other projects gave on the same numbers.

fixtures/quantizers.npz holds random inputs and the outputs of that code, run once; its entry `provenance` says whose.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer.lookup_free import BinaryQuantizer, FsqQuantizer
from tokenizer.nearest import entropies
from tokenizer.quantize import Quantizer, QuantizerConfig, SharedIndexQuantizer
from tokenizer.residual import ResidualQuantizer
from tokenizer.tables import EmaTable

FILE = np.load(Path(__file__).parent / "fixtures" / "quantizers.npz")
EQUAL_WEIGHTS: dict[str, Any] = {"semantic_weights": (1.0,), "pixel_weights": (1.0,), "semantic_norm": True, "pixel_norm": True,
                                 "semantic_table": "free", "pixel_table": "free"}


def of(name: str) -> dict[str, torch.Tensor]:
    values = {key.split("/")[1]: torch.from_numpy(FILE[key]) for key in FILE.files if key.startswith(name + "/")}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in values.items()}


def put(quantizer: SharedIndexQuantizer, book: int, semantic: torch.Tensor | None, pixel: torch.Tensor | None) -> None:
    for table, rows in ((quantizer.semantic_tables[book], semantic), (quantizer.pixel_tables[book], pixel)):
        if rows is not None:
            table.put(torch.arange(len(rows)), rows)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(a, b, atol=atol, rtol=1e-4)


def test_one_book_with_equal_weights_is_tokenflows_shared_mapping() -> None:
    o = of("tokenflow")
    q = SharedIndexQuantizer(QuantizerConfig(codebook_size=64, semantic_dim=8, pixel_dims=(4,), gradient="latent", **EQUAL_WEIGHTS))
    put(q, 0, o["semantic"], o["pixel"])
    z = o["z"].clone().requires_grad_()
    out = q.train()(z)
    (torch.einsum("nd,nd->", out.entries, o["w"]) + out.losses["quantize"]).backward()
    assert torch.equal(out.codes[:, 0], o["codes"]) and close(out.entries, o["q"]) and close(out.losses["quantize"], o["loss"])
    assert z.grad is not None and close(z.grad, o["grad"])
    table_grad = q.semantic_tables[0].entries.grad  # pyright: ignore
    assert table_grad is not None and close(table_grad, o["grad_semantic"])  # pyright: ignore


def test_eight_books_without_a_pixel_part_are_unitoks() -> None:
    o = of("unitok")
    q = SharedIndexQuantizer(QuantizerConfig(codebook_size=32, semantic_dim=4, pixel_dims=(0,) * 8, gradient="latent", **EQUAL_WEIGHTS))
    for m, rows in enumerate(o["tables"]):
        put(q, m, rows, None)
    out = q.train()(o["z"])
    assert torch.equal(out.codes, o["codes"]) and close(out.entries, o["q"]) and close(out.losses["quantize"], o["loss"])


def test_index_backpropagation_has_ibqs_codes_loss_and_gradients() -> None:
    o = of("ibq")
    q = SharedIndexQuantizer(QuantizerConfig(codebook_size=48, semantic_dim=0, pixel_dims=(6,), pixel_norm=False, gradient="all",
                                             semantic_weights=(1.0,), pixel_table="free", semantic_table="free"))
    put(q, 0, None, o["table"])
    z = o["z"].clone().requires_grad_()
    out = q.train()(z)
    ((out.entries * o["w"]).sum() + out.losses["quantize"]).backward()
    assert torch.equal(out.codes[:, 0], o["codes"]) and close(out.entries, o["q"]) and close(out.losses["quantize"], o["loss"])
    assert z.grad is not None and close(z.grad, o["grad"])
    assert close(q.pixel_tables[0].entries.grad, o["grad_table"])  # pyright: ignore


def test_bits_are_open_magvits_lookup_free_codes_and_entropies() -> None:
    o = of("lfq")
    q = BinaryQuantizer(QuantizerConfig(kind="lfq", bits=(8,), entropy_temperature=0.01, entropy_latents=1)).train()
    out = q(o["z"])
    assert torch.equal(out.codes[:, 0], o["codes"]) and torch.equal(out.entries.sign(), o["q"].sign())
    sure, used = q.entropies(o["z"])
    assert close(sure, o["sample"], 2e-3) and close(used, o["batch"], 2e-3)  # theirs adds 1e-5 inside each logarithm of 256
    assert close(out.losses["entropy"], o["entropy"], 4e-3)


def test_a_simvq_table_chooses_as_tars() -> None:
    o = of("tar")
    settings: dict[str, Any] = {**EQUAL_WEIGHTS, "semantic_table": "simvq"}
    q = SharedIndexQuantizer(QuantizerConfig(codebook_size=40, semantic_dim=6, pixel_dims=(0,), **settings))
    with torch.no_grad():
        q.semantic_tables[0].gaussian.copy_(o["gaussian"])  # pyright: ignore
        q.semantic_tables[0].projection.copy_(o["weight"].T)  # pyright: ignore
    assert torch.equal(q.encode(o["z"])[:, 0], o["codes"]) and close(q(o["z"]).entries, o["q"])


def test_residual_steps_are_rq_transformers() -> None:
    o = of("rq")
    q = ResidualQuantizer(QuantizerConfig(kind="residual", codebook_size=32, depth=4, dims=6, commitment=1.0)).eval()
    q.table.put(torch.arange(32), o["table"])
    out = q(o["z"])
    assert torch.equal(out.codes, o["codes"]) and close(out.entries, o["q"]) and close(q.decode(o["codes"]), o["embed"])
    assert close(out.losses["quantize"] / 2, o["loss"])  # ours pulls both ways, theirs has an EMA book and pulls latents alone


def test_rounded_dims_are_vector_quantize_pytorchs_fsq() -> None:
    o = of("fsq")
    out = FsqQuantizer(QuantizerConfig(kind="fsq", levels=(8, 5, 5, 5)))(o["z"])
    assert torch.equal(out.codes[:, 0], o["codes"]) and close(out.entries, o["q"])


def test_one_step_of_a_moving_average_by_cosine_is_vector_quantize_pytorchs() -> None:
    o = of("ema")
    table = EmaTable(20, 6, momentum=0.9)
    table.put(torch.arange(20), o["before"])
    z = F.normalize(o["z"], dim=-1)
    table.follow(z, o["codes"])
    assert close(F.normalize(table.rows(), dim=-1), o["after"])


def test_analytic_entropies_of_bits_are_those_of_the_softmax_over_all_codes() -> None:
    """BSQ by brute force: softmax over every point of the hypercube on the sphere."""
    torch.manual_seed(0)
    q = BinaryQuantizer(QuantizerConfig(kind="bsq", bits=(8,), entropy_temperature=0.1))
    point = F.normalize(torch.randn(30, 8), dim=-1)
    entries = q.decode(torch.arange(256)[:, None])
    assert close(entries.norm(dim=-1), torch.ones(256))
    p = (2 * point @ entries.T / 0.1).softmax(-1)
    sure, used = q.entropies(point)
    assert close(sure, torch.special.entr(p).sum(-1).mean()) and close(used, torch.special.entr(p.mean(0)).sum())
    assert q.entropies(point, group=1)[1] >= used - 1e-6  # bits taken alone have at least the entropy they have together


def test_bits_decode_to_what_encodes_to_them() -> None:
    for config in (QuantizerConfig(kind="bsq", bits=(9, 9)), QuantizerConfig(kind="lfq", bits=(6,))):
        q: Quantizer = BinaryQuantizer(config)
        codes = torch.randint(q.codebook_size, (50, q.num_books))
        assert torch.equal(q.encode(q.decode(codes)), codes)


def test_every_finite_scalar_code_has_an_entry_of_its_own() -> None:
    q = FsqQuantizer(QuantizerConfig(kind="fsq", levels=(8, 5, 5, 5)))
    entries = q.decode(torch.arange(1000)[:, None])
    assert len(entries.unique(dim=0)) == 1000
    assert torch.equal(q(entries * 3).codes, q.encode(entries * 3))


def test_entropies_of_codes_that_nothing_is_near_have_finite_gradients() -> None:
    z = (torch.ones(20, 8) * 50).requires_grad_()
    sure, used = BinaryQuantizer(QuantizerConfig(kind="lfq", bits=(8,))).entropies(z)
    assert torch.autograd.grad(sure - used, z)[0].isfinite().all()
    sure, used = entropies(z, torch.eye(8), 0.01)
    assert torch.autograd.grad(sure - used, z)[0].isfinite().all()
