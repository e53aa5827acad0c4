"""A plan's numbers: weights exact, times and memory held against published runs, arithmetic against the slow obvious version."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from plan_shapes import LAYOUTS, VOCAB
from published_runs import FITTED, LLAMA_8B, LLAMA_70B, LLAMA_405B, QWEN3_06B, QWEN3_8B, QWEN3_30B, RUNS, TITAN, Run
from toy_rows import TINY, tiny
from toy_rows import VOCAB as TOY

from data.config import DataConfig
from mmllm import cli
from mmllm.config import Fp8, Model, Parallel
from mmllm.flops import step_flops
from mmllm.hf_config import model_config
from mmllm.plan import memory, parameters, report, search, step
from mmllm.plan.hardware import GPUS
from mmllm.plan.job import Job
from mmllm.plan.recipe import Given, job_of
from mmllm.runs.sft_recipe import Lora
from mmllm.violations import violations

H100 = GPUS["h100"]
BIG = Job(model=LLAMA_70B, parallel=Parallel(ranks=64, tp=4, pp=4), vocab=128_256, row_len=8192, global_batch=128)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_run_is_planned_within_a_fifth_of_its_step_time(run: Run) -> None:
    planned = step.estimate(run.job, GPUS[run.hardware])
    published_s = planned.flops / run.tflops / 1e12 / run.job.parallel.ranks
    assert planned.seconds == pytest.approx(published_s, rel=0.05 if run.name in FITTED else 0.2)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_run_fits_where_it_ran(run: Run) -> None:
    assert memory.worst(run.job).total <= GPUS[run.hardware].memory_bytes


def test_the_modules_of_transformers_are_planned_slower_than_fused_ones() -> None:
    assert step.estimate(TITAN, H100).tokens_per_s == pytest.approx(5762, rel=0.1)
    assert step.estimate(replace(TITAN, eager=False), H100).tokens_per_s > 8000


def test_most_published_runs_are_held_out() -> None:
    assert set(FITTED) < {run.name for run in RUNS} and len(RUNS) - len(FITTED) >= 12


@pytest.mark.parametrize(("model", "vocab", "published"), [
    (LLAMA_8B, 128_256, 8_030_261_248), (LLAMA_70B, 128_256, 70_553_706_496), (LLAMA_405B, 128_256, 405_853_388_800),
    (QWEN3_8B, 151_936, 8_190_735_360), (QWEN3_06B, 151_936, 596_049_920), (QWEN3_30B, 151_936, 30_532_122_624)])
def test_weights_are_those_of_the_published_checkpoint(model: Model, vocab: int, published: int) -> None:
    """As the index of each model's safetensors on huggingface.co says."""
    assert parameters.whole(model, vocab).total == published


def test_the_models_of_the_megatron_table_have_about_the_weights_of_their_names() -> None:
    """The names round, now up, now down."""
    for run in RUNS:
        if run.name.startswith("Megatron"):
            assert parameters.whole(run.job.model, run.job.vocab).total / 1e9 == pytest.approx(float(run.name.split()[1][:-1]), rel=0.03)


def test_a_token_meets_the_active_weights() -> None:
    assert parameters.active(QWEN3_30B, 151_936) == pytest.approx(3.35e9, rel=0.01)        # "A3B", embeddings included
    assert parameters.active(QWEN3_8B, 151_936) == parameters.whole(QWEN3_8B, 151_936).total


def test_every_rank_holds_the_weights_that_megatron_builds() -> None:
    script = Path(__file__).parent / "plan_shapes.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    for name, (model, layout) in LAYOUTS.items():
        job = Job(model=model, parallel=layout, vocab=model.vocab_rows(VOCAB), row_len=256, global_batch=64)
        assert [parameters.of_stage(job, stage).total for stage in range(layout.pp)] == built[name], name


@pytest.mark.parametrize("model", [LLAMA_8B, QWEN3_30B])
def test_flops_are_those_that_training_reports(model: Model) -> None:
    job = Job(model=model, parallel=Parallel(ranks=8), vocab=128_256, row_len=512, global_batch=16, attended=128)
    assert step.model_flops(job) == pytest.approx(step_flops(model, 128_256, [128] * (job.tokens // 128), job.tokens), rel=2e-3)


@pytest.mark.parametrize("chunks", [1, 2, 5, 10])
def test_the_first_stage_keeps_what_its_schedule_has_in_flight(chunks: int) -> None:
    """L (1 + (p − 1) / (p m)) layers' worth: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.3."""
    job = replace(BIG, parallel=replace(BIG.parallel, virtual_stages=chunks), global_batch=256)
    p = job.parallel.pp
    assert memory.in_flight(job, 0) == pytest.approx(p * (1 + (p - 1) / (p * chunks)) if chunks > 1 else p)
    assert memory.in_flight(job, p - 1) >= 1


def test_a_layer_keeps_what_a_sum_over_its_tensors_says() -> None:
    """Llama 8B in bf16: 34 h bytes a token with attention's scales beside, which is what a gated MLP of 3.5 h comes to."""
    one = Job(model=LLAMA_8B, parallel=Parallel(), vocab=128_256, row_len=8192, global_batch=1)
    tensors = {"norms": 4 * 4096, "queries": 4096, "keys and values": 2 * 1024, "attention": 4096, "gate and up": 2 * 14_336,
               "down": 14_336}
    assert memory.kept_bytes(one, False) == 2 * sum(tensors.values()) + 4 * 32
    assert memory.kept_bytes(replace(one, parallel=Parallel(ranks=4, tp=4)), False) == memory.kept_bytes(one, False) / 4
    loose = replace(one, parallel=Parallel(ranks=4, tp=4, sequence_parallel=False))
    assert memory.kept_bytes(loose, False) == 2 * 4 * 4096 + (memory.kept_bytes(one, False) - 2 * 4 * 4096) / 4


def test_less_is_kept_and_more_is_computed_with_recompute() -> None:
    plain, full = (replace(BIG, parallel=replace(BIG.parallel, recompute=how)) for how in ("none", "full"))
    parts = replace(BIG, parallel=replace(BIG.parallel, recompute="selective", recompute_modules=("layernorm", "mlp")))
    kept = [memory.worst(job).activations for job in (plain, parts, full)]
    took = [step.estimate(job, H100).seconds for job in (plain, parts, full)]
    assert kept == sorted(kept, reverse=True) and took == sorted(took)
    assert took[-1] / took[0] == pytest.approx(4 / 3, rel=0.08)                                  # one forward pass more


def test_optimizer_state_is_split_over_data_parallel_ranks_and_adds_up() -> None:
    for ranks in (16, 64, 256):
        job = replace(BIG, parallel=replace(BIG.parallel, ranks=ranks), global_batch=256)
        whole = sum(memory.of(job, stage).optimizer for stage in range(4)) * ranks / 4
        assert whole == pytest.approx(12 * parameters.whole(LLAMA_70B, 128_256).total, rel=1e-3)


def test_parts_of_a_step_add_up_to_it() -> None:
    planned = step.estimate(replace(BIG, parallel=replace(BIG.parallel, cp=2)), H100)
    assert sum(planned.parts.values()) == pytest.approx(planned.seconds)
    assert planned.sent["tp"] > 0 and planned.sent["pp"] > 0 and planned.sent["cp"] > 0 and planned.sent["ep"] == 0


def test_the_bubble_is_what_narayanan_says() -> None:
    """(p − 1) / (v m) of the time without it: arXiv:2104.04473, section 2.2."""
    for chunks in (1, 5):
        planned = step.estimate(replace(BIG, parallel=replace(BIG.parallel, virtual_stages=chunks)), H100).parts
        steady = sum(planned.values()) - planned["bubble"] - planned["dp"] - planned["optimizer"]
        assert planned["bubble"] / steady == pytest.approx(3 / (chunks * BIG.m))


def test_a_plan_is_plain_values_and_lines() -> None:
    recipe = cli.recipe_of("pretrain_8b_fp8", object)
    found = report.plan("pretrain_8b_fp8", recipe, job_of(recipe, Given()), H100)
    assert json.loads(json.dumps(found)) == found
    assert found["memory"]["total"] == pytest.approx(sum(found["memory"][kind] for kind in report.STATES))
    text = "\n".join(report.lines(found))
    assert "7,752,430,592" in text and "planned, not measured" in text


def test_what_will_not_fit_is_refused_and_the_nearest_that_does_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "pretrain_8b_fp8", "--gpus", "8", "--parallel.tp", "1"]
    with pytest.raises(ValueError, match=r"will not fit: a rank of stage 0 needs 94\.\d GiB") as caught:
        cli.run(words)
    assert "memory       94." in capsys.readouterr().out
    change = str(caught.value).split("the nearest that does: ")[1].split(" (")[0]
    cli.run([*words, *change.split()])                                                           # a change of the same command line
    assert "GPU hours" in capsys.readouterr().out


def test_what_cannot_work_is_listed_at_once_with_a_layout_that_does() -> None:
    with pytest.raises(ValueError, match="8 key heads cannot be split over 3 ranks") as caught:
        cli.run(["plan", "pretrain_8b_fp8", "--parallel.tp", "3"])
    assert "no multiple of tp × pp × cp" in str(caught.value) and "--parallel.tp 2" in str(caught.value)


def test_a_recipe_that_fits_is_its_own_nearest() -> None:
    recipe = cli.recipe_of("pretrain_70b_fp8", object)
    found = search.nearest(recipe, H100, Given())
    assert found is not None and found.changes == () and found.recipe == recipe


def test_every_layout_that_is_proposed_passes_the_recipes_own_check() -> None:
    recipe = replace(cli.recipe_of("pretrain_8b_fp8", object), parallel=Parallel(ranks=16))
    found = list(search.working(recipe, H100, Given()))
    assert found and not any(violations(candidate.recipe) for candidate in found)  # type: ignore[arg-type]


def test_nothing_is_proposed_where_nothing_fits() -> None:
    recipe = cli.recipe_of("pretrain_70b_fp8", object)
    assert search.nearest(replace(recipe, parallel=Parallel(ranks=8)), H100, Given()) is None


def test_fp8_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(ValueError, match="A100 SXM 80 GB has no fp8"):
        step.estimate(replace(BIG, fp8=Fp8(scaling="tensorwise")), GPUS["a100"])


def test_a_vocabulary_that_nobody_knows_is_asked_for() -> None:
    with pytest.raises(ValueError, match="give --vocab-size"):
        job_of(tiny(Path("x")), Given())
    assert job_of(tiny(Path("x")), Given(vocab_size=1000)).vocab == TINY.vocab_rows(1000) == 1024


def test_tuning_is_planned_with_what_its_zero_stage_splits() -> None:
    decoder = cli.recipe_of("continue_qwen3_8b", object)
    recipe = replace(cli.recipe_of("sft_8b", object), ranks=8)
    three, two, adapters = (memory.worst(job_of(changed, Given(decoder=decoder))) for changed in (
        recipe, replace(recipe, zero_stage=2), replace(recipe, zero_stage=2, lora=Lora(rank=64, rows="none"))))
    assert three.weights * 8 == pytest.approx(two.weights) and three.optimizer == two.optimizer
    assert adapters.weights == two.weights and adapters.optimizer < two.optimizer / 40
    with pytest.raises(ValueError, match="give --decoder RECIPE"):
        job_of(recipe, Given())


def test_a_tuning_that_will_not_fit_is_given_a_stage_or_an_offload_that_does() -> None:
    recipe = replace(cli.recipe_of("sft_8b", object), ranks=2, zero_stage=2)
    found = search.nearest(recipe, H100, Given(decoder=cli.recipe_of("continue_qwen3_8b", object)))
    assert found is not None and found.changes


def test_hardware_that_is_not_in_the_table_is_refused_with_what_is() -> None:
    with pytest.raises(ValueError, match="give one of a100, h100"):
        cli.run(["plan", "pretrain_1b", "--hardware", "abacus"])


def test_the_vocabulary_is_read_from_shards_that_are_there(tmp_path: Path) -> None:
    counts = {"documents": 1, "image_codes": 4, "text_ids": 9, "shards": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({"vocab": asdict(TOY), "fingerprint": "toy", **counts}))
    recipe = replace(tiny(Path("x")), data=DataConfig(shards=tmp_path, row_len=256))
    assert job_of(recipe, Given()).vocab == TINY.vocab_rows(TOY.size)


def test_a_tunings_decoder_is_read_from_a_model_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config(TINY, TOY.size, 4096)))
    TOY.save(tmp_path / "vocab.json")
    recipe = replace(cli.recipe_of("sft_tiny", object), init=tmp_path, lora=Lora(rank=2, targets=("q_proj",), rows="ours"))
    job = job_of(recipe, Given())
    assert (job.vocab, job.model.num_layers, job.model.ffn_hidden_size) == (TOY.size, TINY.num_layers, TINY.ffn_hidden_size)
    thin = TINY.num_layers * 2 * (32 + 32)                                     # A [2, 32] and B [32, 2] of each layer's queries
    assert parameters.trained(job, parameters.of_stage(job, 0)).total == thin + 2 * (TOY.size - TOY.text_size) * 32
