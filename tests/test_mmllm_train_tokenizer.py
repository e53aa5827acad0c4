"""A training of the visual tokenizer goes on where it was stopped, bit for bit, and does the same on two ranks, sharded or not."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_world import small_world
from test_tokenizer_text_rows import matrix, write

from data import shards
from data.images import to_png
from data.pairs import Pairs, batches
from mmllm import launch
from mmllm.manifest import whole
from mmllm.run import read_metrics
from mmllm.runs.tokenizer_parts import Run, freeze, freeze_unused
from mmllm.runs.tokenizer_recipe import Gan, Perturb, Stage, Start, TrainTokenizer, TrainVisual, check, recipe_hash
from mmllm.runs.train_teacher import TeacherTraining
from mmllm.runs.train_tokenizer import assemble, main, train
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.objective import Weights
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import TowerConfig
from tokenizer.text_rows import read

BOOKS = QuantizerConfig(codebook_size=32, semantic_dim=4, pixel_dims=(4, 4), semantic_weights=(1.0,), pixel_norm=True, semantic_table="ema",
                        pixel_table="free")
TINY = TrainTokenizer(
    model=TokenizerConfig(tower=TowerConfig(width=32, layers=1, heads=2, embed_dim=16), train_tower=True, pixel="vit", width=32, layers=1,
                          heads=2, scales=(1, 2), quantizer=BOOKS),
    teacher=TeacherTraining(steps=6), perceptual="edges", balance_steps=3, balance_every=2, average=0.9, batch=16, micro_batch=8,
    revive_every=2, validate_every=2, log_every=1, save_every=1, keep_last=100, start=Start(patches=256, rounds=2),
    align=Stage(steps=4, weights=Weights(perceptual=0.5, contrastive=1.0), clip_grad=1.0),
    decode=Stage(steps=4, weights=Weights(quantize=0, semantic=0, perceptual=1.0), perturb=Perturb(beta=0.5, neighbours=5),
                 gan=Gan(weight=0.4, channels=8, layers=2, warmup_steps=2)))


def recipe(out: Path, **changes: Any) -> TrainVisual:
    world = small_world()
    world.teacher.save(out / "teacher.safetensors")
    return TrainVisual(raw=world.raw, text=world.text_model, out=out / "visual", training=replace(TINY, **changes))


def weights(made: TrainVisual) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(made.out / "model.safetensors")


def rewind(made: TrainVisual, step: int) -> None:
    """As a kill right after the checkpoint of a step leaves the run."""
    for checkpoint in whole(made.run / "checkpoints"):
        if int(checkpoint.name[5:]) > step:
            for path in checkpoint.iterdir():
                path.unlink()
            checkpoint.rmdir()
    for path in made.out.iterdir():
        path.unlink()


def test_two_times_n_steps_are_n_steps_a_stop_and_n_more_in_either_stage(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    train(made)
    straight, records = weights(made), read_metrics(made.run)
    for step in (6, 4, 2):  # in decode, at the border, in align
        rewind(made, step)
        train(made)
        assert all(torch.equal(weights(made)[name], value) for name, value in straight.items()), step
        again = read_metrics(made.run)
        assert [{k: v for k, v in r.items() if k not in ("images_per_s", "memory_bytes")} for r in again] == \
               [{k: v for k, v in r.items() if k not in ("images_per_s", "memory_bytes")} for r in records]


def test_a_run_killed_in_the_middle_ends_with_the_same_weights(tmp_path: Path) -> None:
    made, killed = recipe(tmp_path / "a"), recipe(tmp_path / "b")
    train(made)
    words = [sys.executable, "-c", "import sys; from pathlib import Path; from test_mmllm_train_tokenizer import train, TrainVisual, TINY; "
             "raw, text, out = map(Path, sys.argv[1:]); train(TrainVisual(raw=raw, text=text, out=out, training=TINY))",
             str(killed.raw), str(killed.text), str(killed.out)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.DEVNULL)
    while not whole(killed.run / "checkpoints") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert whole(killed.run / "checkpoints"), "it ended before it could be killed"
    train(killed)
    assert all(torch.equal(weights(killed)[name], value) for name, value in weights(made).items())


def test_two_ranks_with_half_a_batch_each_do_what_one_does_sharded_or_not(tmp_path: Path) -> None:
    """With perturbation and augmentation, which are each picture's own; without k-means, to which a rank brings other pictures."""
    assert TINY.decode.perturb.beta and TINY.decode.gan.augment
    settings: dict[str, Any] = {"start": Start(patches=0), "save_every": 0}
    runs = {name: recipe(tmp_path / name, **settings, **more) for name, more in
            (("one", {"micro_batch": 16}), ("two", {"ranks": 2}), ("sharded", {"ranks": 2, "sharded": True}))}
    for made in runs.values():
        if made.training.ranks == 1:
            train(made)
        else:
            launch.launch("mmllm.runs.train_tokenizer:train", made, 2)
    one = read_metrics(runs["one"].run)
    for name in ("two", "sharded"):
        for a, b in zip(one, read_metrics(runs[name].run), strict=True):
            for term in ("l1", "l2", "quantize", "contrastive", "semantic", "perceptual", "generator", "discriminator", "grad_norm",
                         "validation"):
                if term in a:
                    assert b[term] == pytest.approx(a[term], rel=2e-3), (name, a["step"], term)
    assert all(torch.allclose(weights(runs["sharded"])[name], value, atol=1e-6) for name, value in weights(runs["two"]).items())


def test_decoding_leaves_every_code_as_it_was(tmp_path: Path) -> None:
    first, second = recipe(tmp_path / "a", decode=Stage(), average=0.0), recipe(tmp_path / "b", average=0.0)
    train(first)
    train(second)
    before, after = weights(first), weights(second)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("pixel.decoder") or name == "scale_embedding" for name in changed)


def test_a_tokenizer_that_is_there_is_not_made_again_and_another_recipes_is_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path, align=Stage(steps=1), decode=Stage(), average=0.0)
    assert main(made) == made.out
    records = read_metrics(made.run)
    (made.out / "config.json").unlink()  # as a kill before the last file leaves it
    main(made)
    assert (made.out / "config.json").is_file() and read_metrics(made.run) != records  # it ran, and measured other speeds
    records = read_metrics(made.run)
    assert main(replace(made, training=replace(made.training, log_every=7))) == made.out and read_metrics(made.run) == records
    with pytest.raises(ValueError, match=f"holds a tokenizer of recipe {recipe_hash(made.training)}, this is recipe .*choose another out"):
        main(replace(made, training=replace(made.training, seed=1)))
    (made.run / "recipe.json").unlink()
    with pytest.raises(ValueError, match="of recipe unknown"):
        main(made)


def test_a_language_models_rows_are_known_by_their_checksum_in_the_tokenizer_and_on_resuming(tmp_path: Path) -> None:
    folder = write(tmp_path / "lm")
    config = replace(TINY.model, quantizer=replace(BOOKS, semantic_table="text"))
    made = recipe(tmp_path, model=config, text_rows=folder, align=Stage(steps=2), decode=Stage(), average=0.0)
    check(made.training)
    train(made)
    rows = read(folder)
    text = VisualTokenizer.load(made.out).text
    assert text is not None and text.checksum == rows.checksum and text.width == rows.embedding.shape[1]
    assert set(text.ids.tolist()) <= set(rows.ids.tolist())
    other = matrix()
    other[0, 0] += 1
    safetensors.torch.save_file({"model.embed_tokens.weight": other}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"checksum {read(folder).checksum}, .*step_0000001 stands on one with {rows.checksum}: put that"):
        train(made)


def test_checkpoints_of_a_recipe_without_their_stage_are_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path, align=replace(TINY.align, steps=2), decode=Stage(), average=0.0)
    train(made)
    with pytest.raises(ValueError, match=f"step_0000001 is of recipe {recipe_hash(made.training)}, this is recipe .*choose another out"):
        train(replace(made, training=replace(made.training, align=Stage(steps=0), decode=Stage(steps=2))))


def test_what_no_loss_reaches_is_found_by_pictures_of_one_size(tmp_path: Path) -> None:
    """Though the first two are not."""
    with tarfile.open(tmp_path / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        for number, size in enumerate(((50, 30), (30, 50), (50, 30))):
            png = to_png(np.full((*size, 3), 90, np.uint8))
            for name, content in (("json", json.dumps({"texts": [None, "a plain"], "images": ["png", None]}).encode()), ("png", png)):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    config = replace(TINY, model=replace(TINY.model, scales=(1,), max_aspect=2.0))
    pairs = Pairs([tmp_path / "train-000000.tar"], config.model.sizes)
    assert pairs.groups[0] != pairs.groups[1]
    objective = assemble(config, None, small_world().text, pairs)
    run = Run(config, "align", config.align, objective, pairs, pairs, tmp_path, 0, 8, torch.device("cpu"))
    freeze(run)
    freeze_unused(run)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert {"tokenizer.semantic_in.weight", "contrast.head.1.weight"} <= trained and "tokenizer.semantic_tower.proj" not in trained


def test_every_pair_is_taken_once_a_pass_and_a_batch_is_of_one_size() -> None:
    groups = torch.tensor([0, 1] * 16 + [0] * 8).numpy()
    stream = batches(groups, 8, seed=3)
    a_pass = [next(stream) for _ in range(5)]
    assert sorted(int(n) for batch in a_pass for n in batch) == list(range(40))
    assert all(len(set(groups[batch])) == 1 for batch in a_pass)
    later = batches(groups, 8, seed=3, first=3)
    assert all((next(later) == batch).all() for batch in a_pass[3:])


def test_an_index_of_pairs_is_kept_and_gives_the_same_pictures(tmp_path: Path) -> None:
    found = shards.find(small_world().raw, "train-")
    fresh, kept = Pairs(found, 32, tmp_path), Pairs(found, 32, tmp_path)
    assert fresh.keys == kept.keys and fresh.texts == kept.texts and (fresh.picture(5) == kept.picture(5)).all()


def test_a_language_models_rows_under_closed_form_patches_are_refused() -> None:
    closed = replace(TINY, model=TokenizerConfig(), text_rows=Path("lm"))
    with pytest.raises(ValueError, match=r"text_rows is lm, but palette patches start from phrases .* set model.pixel to conv or vit"):
        check(closed)


def test_a_recipe_with_several_mistakes_names_them_all() -> None:
    with pytest.raises(ValueError) as caught:
        decode = replace(TINY.decode, perturb=Perturb(beta=1.0, neighbours=99))
        check(replace(TINY, batch=10, scale_odds=(1.0,), perceptual="vgg", decode=decode))
    assert all(word in str(caught.value) for word in ("batch 10", "scale_odds has 1", "perceptual_weights", "neighbours is 99"))
