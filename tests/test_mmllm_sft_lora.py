"""Adapters: what is trained, that merged weights compute what adapted ones do, and that ZeRO changes nothing."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sft_world
import tiny_model
import torch
from sft_world import recipe, stock

from data.chat import ChatLoader
from mmllm import hf
from mmllm.run import read_metrics
from mmllm.runs.sft import main
from mmllm.runs.sft_lora import adapt, merged, write_adapter
from mmllm.runs.sft_loss import AssistantLoss, document_groups
from mmllm.runs.sft_recipe import Lora, Sft, learning_rate

VOCAB = tiny_model.vocabulary()
LORA = Lora(rank=4, alpha=8.0)
one_thread, world = sft_world.one_thread, sft_world.world


def adapted(settings: Sft) -> Any:
    model = stock(settings.init)
    adapt(model, settings, VOCAB.text_size, lambda _: contextlib.nullcontext())
    return model


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", ["none", "ours", "all"])
def test_merged_weights_and_the_saved_adapter_compute_what_the_adapted_model_does(tmp_path: Path, rows: Any, tied: bool) -> None:
    import peft
    base = tiny_model.folder(tmp_path / "model", std=0.1, tie_embeddings=tied)
    settings = recipe(tmp_path, tmp_path / "run", init=base, lora=replace(LORA, rows=rows))
    model, ids = adapted(settings), torch.randint(0, VOCAB.size, (3, 20), generator=torch.Generator().manual_seed(0))
    before = stock(base)(ids).logits
    assert torch.allclose(model(ids).logits, before, atol=1e-5)  # B is zero
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = model(ids).logits
    assert not torch.allclose(expected, before, atol=0.1)
    whole = stock(base)
    whole.load_state_dict(merged(tensors(model), settings), strict=not tied)
    assert torch.allclose(whole(ids).logits, expected, atol=1e-4)
    write_adapter(tmp_path / "adapter", tensors(model), settings, range(VOCAB.text_size, VOCAB.size))
    theirs = peft.PeftModel.from_pretrained(stock(base), tmp_path / "adapter")
    assert torch.allclose(theirs(ids).logits, expected, atol=1e-4)
    assert torch.allclose(theirs.merge_and_unload()(ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("rows", ["none", "ours", "all"])
def test_only_adapters_and_the_chosen_rows_are_trained(world: Path, rows: Any) -> None:
    model = adapted(recipe(world, world, lora=replace(LORA, rows=rows, targets=("q_proj", "down_proj"))))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tables = {"none": set[str](), "ours": {"model.embed_tokens.rows.weight", "lm_head.rows.weight"},
              "all": {"model.embed_tokens.weight", "lm_head.weight"}}[rows]
    assert tables <= trained
    assert trained - tables == {f"model.layers.{layer}.{place}.lora_{letter}.default.weight" for layer in range(2) for letter in "AB"
                                for place in ("self_attn.q_proj", "mlp.down_proj")}


def plain_steps(settings: Sft) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, no DeepSpeed: losses and merged weights."""
    rows, model = ChatLoader(settings.data, tiny_model.text_tokenizer().encode), AssistantLoss(adapted(settings))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, betas=settings.betas, weight_decay=0.0), list[float]()
    for step in range(settings.steps):
        loss, sums = model(document_groups([rows.row(step * 4 + i) for i in range(4)]), VOCAB.first_image)
        loss = loss / (sums[1] + sums[3])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, merged(tensors(model.causal), settings)


@pytest.mark.parametrize(("zero_stage", "more"), [
    (3, {"micro_batch": 1}), pytest.param(2, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    pytest.param(3, {"offload": "all"}, marks=pytest.mark.slow), pytest.param(0, {"ranks": 1}, marks=pytest.mark.slow)])
def test_two_ranks_under_zero_adapt_as_one_without(world: Path, tmp_path: Path, zero_stage: int, more: dict[str, Any]) -> None:
    settings = recipe(world, tmp_path / "run", lora=LORA, zero_stage=zero_stage, **more)
    folder = main(settings)
    losses, weights = plain_steps(settings)
    assert [record["loss"] for record in read_metrics(settings.out)] == pytest.approx(losses, rel=1e-4)
    exported, base = hf.open_folder(folder).tensors(), hf.open_folder(settings.init).tensors()
    assert exported.keys() == base.keys()
    assert all(torch.allclose(exported[name], weights[name], atol=2e-3) for name in weights)
    same = [name for name in base if torch.equal(exported[name], base[name])]
    assert same == [name for name in base if "norm" in name]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(exported[name][:VOCAB.text_size], base[name][:VOCAB.text_size])
    assert (settings.out / "adapter" / "adapter_model.safetensors").is_file()
