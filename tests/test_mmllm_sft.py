"""Instruction tuning: the loss, the groups, and DeepSpeed on two real ranks."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sft_world
import tiny_model
import torch
from sft_world import recipe, start, stock, wait_for
from torch.nn import functional as F

from data.chat import ChatLoader
from data.config import DataConfig
from data.loader import Loader, Row, assemble
from data.plan import Place
from mmllm import hf
from mmllm.generate.engine import Engine
from mmllm.generate.sample import Sampling
from mmllm.launch import STOPPED
from mmllm.manifest import newest
from mmllm.run import read_metrics
from mmllm.runs.sft import check, main
from mmllm.runs.sft_loss import AssistantLoss, _least_padding, document_groups
from mmllm.runs.sft_recipe import Lora, Sft, learning_rate

one_thread, world = sft_world.one_thread, sft_world.world


def rows_of(recipe: Sft) -> ChatLoader:
    return ChatLoader(recipe.data, tiny_model.text_tokenizer().encode)


# Loss -------------------------------------------------------------------------------------------------------------

def plain_loss(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """Document after document, the whole head, no padding."""
    losses = list[torch.Tensor]()
    for row in rows:
        tokens, labels, weight = map(torch.from_numpy, (row.tokens, row.labels, row.loss_weight))
        for a, b in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            loss = F.cross_entropy(model(tokens[None, a:b]).logits[0], labels[a:b], reduction="none")
            losses.append((loss * weight[a:b]).sum())
    return torch.stack(losses).sum()


def test_grouped_loss_and_gradient_equal_those_of_each_document_alone(world: Path) -> None:
    rows = [rows_of(recipe(world, world)).row(i) for i in range(4)]
    one, other = stock(world / "model"), stock(world / "model")
    expected = plain_loss(one, rows)
    loss, sums = AssistantLoss(other)(document_groups(rows), tiny_model.vocabulary().first_image)
    assert torch.allclose(loss, expected, rtol=1e-5) and torch.allclose(sums[0] + sums[2], expected.detach(), rtol=1e-5)
    assert sums[1] + sums[3] == sum(row.loss_weight.sum() for row in rows) and min(sums[1], sums[3]) > 0
    expected.backward()
    loss.backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name


def test_groups_hold_every_trained_token_once(world: Path) -> None:
    rows = [rows_of(recipe(world, world)).row(i) for i in range(6)]
    trained = sorted((int(t), int(label)) for row in rows for t, label, w in
                     zip(row.tokens, row.labels, row.loss_weight, strict=True) if w)
    grouped = sorted((int(t), int(label)) for group in document_groups(rows) for t, label, w in
                     zip(*(x.flatten() for x in group), strict=True) if w)
    assert trained == grouped


def test_rows_without_an_assistant_still_take_part() -> None:
    row = assemble([], ("x",), 8, pad=3)
    groups = document_groups([row])
    assert sum(group.weight.sum() for group in groups) == 0 and groups[0].tokens.shape == (1, 1)


def test_groups_pad_less_than_one_and_never_more_than_asked(world: Path) -> None:
    lengths = sorted(np.random.default_rng(0).integers(10, 200, 60).tolist())
    ranges = _least_padding(lengths)
    assert [i for a, b in ranges for i in range(a, b)] == list(range(60)) and 1 < len(ranges) < 10
    assert sum((b - a) * lengths[b - 1] for a, b in ranges) < 0.8 * 60 * lengths[-1]


def test_the_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    settings = recipe(Path(), Path(), steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.2)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.2)


def test_every_mistake_in_a_recipe_is_named_at_once(world: Path) -> None:
    with pytest.raises(ValueError) as error:
        check(recipe(world, world / "x", global_batch=5, lr=0.0, warmup_steps=9, min_lr_ratio=2.0))
    for line in ("global_batch 5", "lr is 0.0", "warmup_steps is 9", "min_lr_ratio is 2.0"):
        assert line in str(error.value)


@pytest.mark.parametrize("chat", [True, False])
def test_what_was_learned_by_heart_is_drawn_and_answered(tmp_path: Path, chat: bool) -> None:
    """Prompts of the engine are the beginnings of what a model is trained on, conversations or plain documents."""
    shards = tiny_model.token_shards(tmp_path / "shards", documents=4)
    config = DataConfig(shards=shards, row_len=256, draw_ratio=0.5, drop_text=0.0)
    model_folder = tiny_model.folder(tmp_path / "m", std=0.1)
    encode = tiny_model.text_tokenizer().encode
    rows = ChatLoader(config, encode) if chat else Loader(config)
    model = AssistantLoss(stock(model_folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(150):
        loss, sums = model(document_groups([rows.row(2 * step), rows.row(2 * step + 1)]), rows.vocab.first_image)
        (loss / (sums[1] + sums[3])).backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 150)
    learned = {name.removeprefix("causal."): p for name, p in model.named_parameters()}
    hf.write_folder(tmp_path / "learned", learned, tiny_model.model(), rows.vocab, model_folder / "text.model",
                    model_folder / "visual_tokenizer", chat)
    engine, documents = Engine.load(tmp_path / "learned", "cpu"), Loader(config)
    for number in range(4):
        document, text = documents.documents([Place(0, 0, 0, number)])[0], tiny_model.text_tokenizer()
        said = [text.decode(document.part(i).tolist()) for i in range(1, 7)]  # text, caption, two questions with answers
        codes = rows.vocab.codes(document.part(0), 3, 3)
        for caption in said[:2]:
            assert (engine.draw([caption], sampling=Sampling(temperature=0))[0, 0] == codes).all()
        assert engine.describe(codes[None]) == said[:1]
        assert engine.describe(np.stack([codes, codes]), [said[2], said[4]]) == [said[3], said[5]]


# Two ranks --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tuned(world: Path) -> Path:
    return main(recipe(world, world / "run"))


def test_two_ranks_under_zero_take_the_steps_of_one_plain_optimizer(world: Path, tuned: Path) -> None:
    settings = recipe(world, world / "run")
    loader, model = rows_of(settings), stock(world / "model")
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others}], betas=settings.betas, weight_decay=0.0)
    losses = list[float]()
    for step in range(settings.steps):
        rows = [loader.row(step * 4 + i) for i in range(4)]
        loss = plain_loss(model, rows) / float(sum(row.loss_weight.sum() for row in rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [record["loss"] for record in read_metrics(world / "run")] == pytest.approx(losses, rel=1e-4)
    tensors = hf.open_folder(tuned).tensors()
    assert all(torch.allclose(tensors[name], p, atol=2e-3) for name, p in model.named_parameters())
    assert losses[-1] < losses[0] - 0.1


def test_the_tuned_folder_chats_and_opens_with_stock_classes(world: Path, tuned: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = hf.open_folder(tuned)
    assert folder.chat and folder.vocab == tiny_model.vocabulary() and not (world / "run" / "checkpoints").exists()
    assert AutoTokenizer.from_pretrained(tuned).chat_template
    assert AutoModelForCausalLM.from_pretrained(tuned).config.vocab_size == folder.vocab.size


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision", "rel"), [(0, "fp32", 1e-4), (1, "fp32", 1e-4), (3, "fp32", 1e-4),
                                                              (2, "bf16", 2e-2), (3, "bf16", 2e-2)])
def test_every_stage_and_precision_takes_the_same_steps(world: Path, tuned: Path, tmp_path: Path, zero_stage: int,
                                                        precision: str, rel: float) -> None:
    folder = main(recipe(world, tmp_path / "run", zero_stage=zero_stage, precision=precision, micro_batch=1))
    ours, theirs = (read_metrics(out) for out in (tmp_path / "run", world / "run"))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=rel)
    tensors, expected = hf.open_folder(folder).tensors(), hf.open_folder(tuned).tensors()
    assert all(torch.allclose(tensors[name], expected[name], atol=20 * rel) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{"zero_stage": 2}, {"zero_stage": 3, "gradient_checkpointing": True},
                                     {"zero_stage": 3, "offload": "all"}, {"zero_stage": 3, "lora": Lora(rank=4)}])
def test_a_gpu_learns_what_a_cpu_learns(world: Path, tuned: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    """bf16 with fp32 masters, on one device; adapters learn, however little in six steps."""
    main(recipe(world, tmp_path / "run", ranks=1, precision="bf16", **changes))
    ours, theirs = ([record["loss"] for record in read_metrics(out)] for out in (tmp_path / "run", world / "run"))
    if "lora" in changes:
        assert ours[0] == pytest.approx(theirs[0], rel=2e-2) and ours[-1] < ours[0]
    else:
        assert ours == pytest.approx(theirs, rel=2e-2)


def test_killed_and_started_again_it_ends_with_the_same_bits(world: Path, tuned: Path, tmp_path: Path) -> None:
    again = replace(recipe(world, tmp_path / "run"), save_every=2)
    process = start(again, tmp_path)
    wait_for(lambda: newest(again.out / "checkpoints"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert newest(again.out / "checkpoints") and not (again.out / "hf").exists()
    folder = main(again)
    assert (folder / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert [r["loss"] for r in read_metrics(again.out)] == [r["loss"] for r in read_metrics(world / "run")]


@pytest.mark.slow
def test_told_to_stop_it_saves_and_says_so(world: Path, tuned: Path, tmp_path: Path) -> None:
    settings = recipe(world, tmp_path / "run")
    process = start(replace(settings, steps=2000), tmp_path)
    wait_for((settings.out / "metrics.jsonl").exists, process)
    time.sleep(2)
    process.terminate()
    assert process.wait() == STOPPED and newest(settings.out / "checkpoints")


def test_token_shards_of_another_tokenizer_are_refused_in_one_line(world: Path, tmp_path: Path) -> None:
    tiny_model.token_shards(tmp_path / "shards", documents=4, books=1)
    data = DataConfig(shards=tmp_path / "shards", row_len=192)
    with pytest.raises(ValueError, match="encoded under fingerprint"):
        main(recipe(world, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model_is_refused_before_ranks_start(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model folder"):
        main(recipe(world, tmp_path / "run", init=world / "shards"))
    assert not (tmp_path / "run").exists()
