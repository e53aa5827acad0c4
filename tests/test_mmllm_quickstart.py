"""Every stage of the quick start at the smallest size, by the real command line, and what it refuses."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_world import RECIPE as TINY

from data.images import to_png
from data.scenes.image import render
from data.scenes.text import describe
from data.scenes.world import World
from mmllm.config import Model, Optim, Parallel
from mmllm.runs.quickstart import Quickstart, main

MODEL = Model(num_layers=2, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64)
RECIPE = Quickstart(scenes=300, held=32, text_pieces=400, tokenizer=TINY, model=MODEL, steps=8, save_every=4, sft_steps=2, prompts=4,
                    parallel=Parallel(ranks=2), optim=Optim(lr=1e-3, warmup_steps=2))


def mmllm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mmllm.cli", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    main(replace(RECIPE, out=out))
    return out


def test_the_report_has_every_number_and_stands_alone(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"commit", "seed", "machine", "stages", "tokenizer", "understanding", "generation"}
    assert [s["name"] for s in report["stages"]] == ["data", "text tokenizer", "teacher", "visual tokenizer", "token shards", "pretraining",
                                                     "export", "instruction tuning", "evaluation", "report"]
    assert all(s["seconds"] > 0 and s["peak_memory_bytes"] > 1e8 for s in report["stages"])
    assert {"psnr", "scene_exact", "usage", "perplexity"} <= set(report["tokenizer"])
    assert set(report["generation"]["seen"]) == {"single_object", "two_objects", "counting", "colors", "position", "color_attribution",
                                                 "overall"}
    splits = {"seen", "held_out_combinations", "held_out_pairs"}
    assert set(report["generation"]) == set(report["understanding"]) == splits
    assert all({"caption_exact", "answers"} == set(report["understanding"][split]) for split in splits)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 50 and "src='http" not in page and "held-out combinations" in page


def test_a_finished_run_runs_nothing_again(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and not p.name.startswith("report")}
    main(replace(RECIPE, out=run))
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_recipe_is_not_mixed_into_a_run(run: Path) -> None:
    with pytest.raises(ValueError, match=r"another recipe \(different: seed, steps\): choose another --out"):
        main(replace(RECIPE, out=run, seed=1, steps=9))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no quick-start run"):
        main(replace(RECIPE, out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_tuned_folder_draws_and_describes_from_the_command_line(run: Path, tmp_path: Path) -> None:
    model, picture = str(run / "sft" / "hf"), tmp_path / "x.png"
    drawn = mmllm("generate", model, "a red circle above a blue star", "--out", str(picture), "--n", "2", "--guidance", "2", "--seed", "5")
    assert drawn.returncode == 0, drawn.stderr
    first, second = (tmp_path / f"x-{i}.png" for i in range(2))
    assert first.is_file() and second.is_file()
    said = mmllm("describe", model, str(first), "how many stars are there?")
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize(("words", "said"), [
    (["generate", "nowhere", "a star"], "there is no model folder nowhere"),
    (["describe", "{run}/sft/hf", "nowhere.png"], "nowhere.png"),
    (["describe", "{run}/sft/hf", "{run}/recipe.json"], "does not decode as a picture"),
    (["generate", "{run}", "a star"], "is not a model folder"),
    (["quickstart", "--data", "nowhere", "--out", "{tmp}/q"], "--data nowhere does not exist"),
    (["data", "convert", "--source", "{tmp}", "--out", "{tmp}/q"], "holds no picture"),
    (["pretrain", "nothing"], "there is no recipe nothing"),
    (["draw"], "there is no verb 'draw'"),
    (["export", "{run}/pretrain", "--out", "{tmp}/hf", "--tokens", "{run}/tokens", "--tokenizer", "{run}/visual_tokenizer",
      "--text", "{run}/text.model"], "has no state.json"),
])
def test_wrong_input_is_one_line_and_exit_code_2(run: Path, tmp_path: Path, words: list[str], said: str) -> None:
    result = mmllm(*(word.format(run=run, tmp=tmp_path) for word in words))
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback() -> None:
    result = mmllm("generate", "nowhere", "a star", "--debug")
    assert result.returncode != 0 and "Traceback" in result.stderr


def test_a_checkpoint_that_misses_a_file_is_named(run: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run / "pretrain" / "checkpoints" / "step_0000008", tmp_path / "step_0000008"))
    next(broken.glob("*.distcp")).unlink()
    result = mmllm("export", str(broken), "--out", str(tmp_path / "hf"), "--tokens", str(run / "tokens"),
                   "--tokenizer", str(run / "visual_tokenizer"), "--text", str(run / "text.model"))
    assert result.returncode == 2 and ".distcp" in result.stderr and not (tmp_path / "hf").exists()


def test_every_verb_has_help() -> None:
    for verb in ("", "quickstart", "pretrain", "sft", "data scenes", "data convert", "data encode", "text-tokenizer train",
                 "tokenizer train", "tokenizer eval", "export", "generate", "describe", "chat"):
        result = mmllm(*verb.split(), "--help")
        assert result.returncode == 0 and len(result.stdout) > 200, (verb, result.stderr)


@pytest.mark.slow
def test_pictures_of_ones_own_go_through_the_same_pipeline(tmp_path: Path) -> None:
    source, world = tmp_path / "pictures", World.at_level(1)
    source.mkdir()
    for i in range(200):
        scene = world.scene(0, i)
        (source / f"{i}.png").write_bytes(to_png(render(scene)))
        (source / f"{i}.txt").write_text(describe(scene))
    main(replace(RECIPE, out=tmp_path / "run", data=source))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 <= report["generation"]["clip_recall_at_1"] <= 1 and "loss_text" in report["understanding"]
    assert "held-out pictures" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_two_runs_with_one_seed_give_the_same_scores_and_weights(run: Path, tmp_path: Path) -> None:
    main(replace(RECIPE, out=tmp_path / "run"))
    for name in ("scores.json", "visual_tokenizer/model.safetensors", "pretrain/hf/model.safetensors", "sft/hf/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
