"""`mmllm eval` on a tiny model: whole, interrupted, shared out, compared; and each task against the slow obvious way."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch

from data import shards
from data.curate.clip import Clip
from data.document import Document
from data.scenes import shards as scene_shards
from data.scenes.tasks import SKILLS
from mmllm import cli
from mmllm.evaluate import answers, captions, likelihood, retrieval
from mmllm.evaluate.compare import compare
from mmllm.evaluate.generation import by_skill
from mmllm.evaluate.geneval import read_results
from mmllm.evaluate.items import Item, coded, items
from mmllm.evaluate.likelihood import drawing, log_likelihood, log_probabilities, reading
from mmllm.evaluate.model import evaluate, kept
from mmllm.evaluate.resemblance import clip_scores, distance
from mmllm.evaluate.settings import Evaluation
from mmllm.evaluate.task import Given
from mmllm.generate.engine import Engine
from tokenizer.metrics import Moments, frechet_distance

QUICK = Evaluation(limit=6, prompts=2, candidates=3, batch=4, resamples=100, max_text=8, device="cpu",
                   tasks=("captions", "questions", "retrieval", "perplexity", "scenes", "pictures"))


@cache
def world() -> tuple[Path, Path, Path]:
    """A tuned model, one of plain documents, and raw shards of scenes, among them a text alone and a conversation."""
    folder = Path(mkdtemp(prefix="mmllm-eval-"))
    raw = folder / "raw"
    scene_shards.write(raw, level=1, seed=0, train=4, held=8)
    pair = next(shards.read(raw / "seen-000000.tar"))
    picture = next(part for part in pair.parts if isinstance(part, bytes))
    shards.write([Document("read", ("a red star above", picture, "two rings")), Document("words", ("a blue star",)),
                  Document("talk", ("draw a star", picture, "what is it?", "a star"), roles=("user", "assistant", "user", "assistant"))],
                 raw, "mixed")
    return tiny_model.folder(folder / "tuned", chat=True), tiny_model.folder(folder / "plain"), raw


@cache
def measured() -> tuple[dict[str, Any], Path]:
    model, _, raw = world()
    out = Path(mkdtemp(prefix="mmllm-eval-out-"))
    return evaluate(model, raw, out, QUICK), out


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(world()[0], "cpu")


# The whole ----------------------------------------------------------------------------------------------------------

def test_every_number_has_an_interval_and_what_is_missing_says_why() -> None:
    record, out = measured()
    assert list(record["tasks"]) == ["captions", "questions", "retrieval", "perplexity", "scenes", "pictures"]
    for task in record["tasks"].values():
        for what, score in task["scores"].items():
            assert score["low"] <= score["value"] + 1e-12 or what.endswith("overall"), (what, score)
            assert score["value"] <= score["high"] + 1e-12 and score["units"] > 0
    assert record["tasks"]["pictures"]["missing"]["fid"] == "no weights given (--inception)"
    assert {"seen/cider", "seen/bleu_4", "seen/rouge_l", "seen/scene_exact"} <= set(record["tasks"]["captions"]["scores"])
    page = (out / "eval.html").read_text()
    assert "https://" not in page and page.count("<svg") > 50 and "not measured, no weights given" in page
    assert json.loads((out / "eval.json").read_text()) == json.loads(json.dumps(record))


def test_an_evaluation_goes_on_where_it_was_interrupted_and_ends_the_same(tmp_path: Path) -> None:
    model, _, raw = world()
    record, out = measured()
    (tmp_path / "records").mkdir()
    for name in ("captions", "scenes"):  # killed within the fourth record
        lines = (out / "records" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "records" / f"{name}.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    told: list[tuple[str, int, int]] = []
    few = replace(QUICK, tasks=("captions", "scenes"))
    again = evaluate(model, raw, tmp_path, few, lambda *what: told.append(what))
    assert told[0] == ("captions", 3, len(kept(out / "measures" / "captions.npz")["seen/cider"].units) * 3)
    for name in ("captions", "scenes"):
        assert again["tasks"][name]["scores"] == record["tasks"][name]["scores"]
        before, now = ((folder / "records" / f"{name}.jsonl").read_text() for folder in (out, tmp_path))
        assert sorted(before.splitlines()) == sorted(now.splitlines())


def test_a_finished_task_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, _, raw), (record, out) = world(), measured()

    def never(*_: object) -> None:
        raise AssertionError("the model was opened again")

    monkeypatch.setattr(Engine, "load", never)
    assert evaluate(model, raw, out, QUICK)["tasks"] == record["tasks"]


def test_records_of_another_model_or_another_seed_are_refused() -> None:
    (tuned, plain, raw), (_, out) = world(), measured()
    with pytest.raises(ValueError, match=r"captions\.jsonl was made by another evaluation \(model .*choose another --out"):
        evaluate(plain, raw, out, QUICK)
    with pytest.raises(ValueError, match="seed 0 then, 1 now"):
        evaluate(tuned, raw, out, replace(QUICK, tasks=("scenes",), seed=1, prompts=1))


def test_nothing_depends_on_the_batch(tmp_path: Path) -> None:
    model, _, raw = world()
    other = evaluate(model, raw, tmp_path, replace(QUICK, batch=7, tasks=("questions", "perplexity", "scenes")))
    for name, task in other["tasks"].items():
        for what, score in task["scores"].items():
            assert score["value"] == pytest.approx(measured()[0]["tasks"][name]["scores"][what]["value"], rel=1e-5, nan_ok=True)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    model, _, raw = world()
    other = evaluate(model, raw, tmp_path, replace(QUICK, processes=2))
    for name, task in other["tasks"].items():
        for what, score in task["scores"].items():
            assert score["value"] == pytest.approx(measured()[0]["tasks"][name]["scores"][what]["value"], rel=1e-4, nan_ok=True)


def test_documents_of_a_large_split_are_chosen_by_their_names() -> None:
    raw = world()[2]
    few, all_of_them = items(raw, "seen-", 3), items(raw, "seen-", 100)
    assert few == all_of_them[:3] and len(all_of_them) == 8
    assert {item.split for item in items(raw, None, 9)} == {"seen", "held_out_combinations", "held_out_pairs", "mixed"}


# Comparison ---------------------------------------------------------------------------------------------------------

def test_runs_are_compared_unit_by_unit_and_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain, raw = world()
    first = measured()[1]
    evaluate(plain, raw, tmp_path / "plain", replace(QUICK, tasks=("captions", "perplexity", "pictures")))
    cli.run(["eval", "compare", str(first), str(tmp_path / "plain"), str(first), "--out", str(tmp_path / "c.html"), "--resamples", "100"])
    found = json.loads((tmp_path / "c.json").read_text())["differences"]
    other, same = found["perplexity"]["seen/text after its picture, bits/byte"]
    assert other["paired"] and other["value"] != 0 and same == {"value": 0.0, "low": 0.0, "high": 0.0, "paired": True}
    assert found["questions"]["seen/overall"][0] is None  # the second run did not ask
    assert not found["pictures"]["all/fd_teacher"][0]["paired"]
    page = (tmp_path / "c.html").read_text()
    assert "B − A" in page and "C − A" in page and "https://" not in page and "page: " in capsys.readouterr().out


def test_only_evaluations_are_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 evaluation given"):
        compare([measured()[1]], tmp_path / "c.html")
    with pytest.raises(FileNotFoundError, match=r"holds no eval\.json"):
        compare([measured()[1], tmp_path], tmp_path / "c.html")


# Tasks --------------------------------------------------------------------------------------------------------------

def test_log_probabilities_are_those_of_one_sequence_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    some = items(world()[2], "seen-", 5)
    codes = coded(engine, [item.picture for item in some], [item.name for item in some])
    sequences = [made(engine, one, item.texts[0]) for one, item in zip(codes, some, strict=True) for made in (reading, drawing)]
    together = list(log_probabilities(engine, sequences))
    monkeypatch.setattr(likelihood, "LOGITS", 1)
    for one, values, alone in zip(sequences, together, log_probabilities(engine, sequences), strict=True):
        assert len(values) == len(one.ids) - 1
        torch.testing.assert_close(values, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chat", [True, False])
def test_a_folder_is_asked_as_it_was_trained(chat: bool) -> None:
    engine = Engine.load(world()[0 if chat else 1], "cpu")
    vocab, codes = engine.folder.vocab, np.zeros((2, 3, 3), np.int32)
    read, drawn = reading(engine, codes, "a star"), drawing(engine, codes, "a star")
    assert (vocab.assistant in read.ids) == chat and (vocab.assistant in drawn.ids) == chat
    learned = read.ids[read.loss_weight > 0].tolist()
    assert learned == [*engine.folder.text.encode("a star"), vocab.eos]
    codes_of_it = drawn.ids[(drawn.loss_weight > 0) & (drawn.ids >= vocab.first_image)]
    assert codes_of_it.tolist() == vocab.image_ids(codes).tolist()


def test_bits_are_those_of_the_likelihood(engine: Engine) -> None:
    raw = world()[2]
    some = [item for item in items(raw, None, QUICK.limit) if item.split == "seen"]
    codes = coded(engine, [item.picture for item in some], [item.name for item in some])
    found = log_likelihood(engine, codes, [item.texts[0] for item in some], [(i, i) for i in range(len(some))])
    scores, nats = measured()[0]["tasks"]["perplexity"]["scores"], -found["text"].sum().item()
    size = sum(len(item.texts[0].encode()) for item in some)
    assert scores["seen/text after its picture, bits/byte"]["value"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    tokens = sum(len(engine.folder.text.encode(item.texts[0])) + 1 for item in some)
    assert np.log(scores["seen/text after its picture, perplexity"]["value"]) == pytest.approx(nats / tokens, rel=1e-5)


def test_what_is_read_in_order_and_what_is_said_are_measured_too() -> None:
    found = {json.loads(line)["name"]: json.loads(line)["found"]
             for line in (measured()[1] / "records" / "perplexity.jsonl").read_text().splitlines()[1:]}
    text = tiny_model.text_tokenizer()
    assert found["mixed/words"]["text"][1:] == [len(text.encode("a blue star")) + 1, len("a blue star")]
    assert found["mixed/read"]["picture"][1:] == [18, 3 * 24 * 24]
    assert found["mixed/talk"]["text"][2] == len("a star") and found["mixed/talk"]["picture"][1:] == [18, 3 * 24 * 24]


def test_ranks_are_counted_against_the_model_and_the_same_text_is_no_rival() -> None:
    values = np.array([[3.0, 3.0, 1.0, 9.0], [5.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 7.0]])
    assert retrieval.ranks(values, ["a", "b", "c", "a"]).tolist() == [1, 1, 3, 0]  # a tie is lost, and 9.0 bears the same text
    slow = [sum(v >= values[i, i] for j, v in enumerate(values[i]) if j != i) for i in range(4)]
    assert retrieval.ranks(values, ["a", "b", "c", "d"]).tolist() == slow


def test_answers_are_right_but_for_case_and_a_stop_and_are_told_apart_by_kind() -> None:
    assert answers.right("Red. ", "red") and not answers.right("reddish", "red")
    kinds = [answers.kind_of_answer(words) for words in ("yes", "three", "12", "top left")]
    assert kinds == ["yes/no", "number", "number", "other"]
    rows = [{"kind": "what color", "question": "?", "expected": "red", "said": said} for said in ("red", "blue")]
    found = answers.score(given(Path()), [{"name": "a", "split": "seen", "answers": rows}]).measures
    assert found["seen/overall"].value == 0.5 and found["seen/asked the rest"].value == 0.5 and "seen/asked what color" not in found


def given(out: Path, **changes: Any) -> Given:
    model, _, raw = world()
    return Given(model=model, shards=raw, out=out, settings=replace(QUICK, **changes))


def test_words_are_cut_as_penn_treebank_does_where_captions_are_plain() -> None:
    pytest.importorskip("pycocoevalcap")
    records = [{"said": "A red star, above two rings.", "references": ["a red star above two rings", "two rings - below it"]}]
    plain = captions.tokenized(records, "plain")
    assert plain[0] == {0: ["a red star above two rings"]} and plain[1] == {0: ["a red star above two rings", "two rings below it"]}
    if captions.shutil.which("java"):
        assert captions.tokenized(records, "ptb") == plain


def test_captions_that_repeat_a_reference_score_highest() -> None:
    pytest.importorskip("pycocoevalcap")
    said = {0: ["a red star above two rings"], 1: ["a green square left of a ring"]}
    found = captions.overlap(said, {i: [*words, "something else"] for i, words in said.items()})
    assert found["rouge_l"].tolist() == [1, 1] and found["cider"] == pytest.approx([5, 5])  # 10, over two references of which one is alike


def test_a_skill_counts_as_much_as_another() -> None:
    records = [{"name": f"{skill}/{n}", "split": "seen", "skill": skill, "right": skill == "colors"} for skill in SKILLS for n in range(3)]
    found = by_skill(records)
    assert found["seen/overall"].value == pytest.approx(1 / len(SKILLS)) and found["seen/colors"].value == 1


def test_a_distance_of_features_is_the_plain_one_and_none_to_themselves() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(60, 5, generator=random, dtype=torch.float64) + shift for shift in (0, 0.3))
    moments = [Moments.empty(5), Moments.empty(5)]
    for side, values in zip(moments, (a, b), strict=True):
        side.add(values)
    found = distance(a, b, 0)
    assert found["value"] == pytest.approx(frechet_distance(*moments)) and found["low"] < found["value"] < found["high"]
    assert distance(a, a, 0)["value"] == pytest.approx(0, abs=1e-9)


def test_clip_scores_are_the_cosines_of_open_clip_s_own_model(tmp_path: Path) -> None:
    import open_clip

    shape: Any = {"embed_dim": 8, "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
             "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
    torch.manual_seed(0)
    whole = open_clip.CLIP(**shape).eval()
    (tmp_path / "clip").mkdir()
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": statistics}))
    torch.save(whole.state_dict(), tmp_path / "clip/open_clip_pytorch_model.bin")
    clip = Clip.load(f"open_clip:{tmp_path / 'clip'}", torch.device("cpu"))
    picture, text = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), "a red star"
    with torch.no_grad():
        image = whole.encode_image(torch.from_numpy(picture / 127.5 - 1).float().movedim(-1, 0)[None], normalize=True)
        words = whole.encode_text(open_clip.SimpleTokenizer(context_length=12)([text]), normalize=True)
    assert clip_scores(clip, [picture], [text]).tolist() == pytest.approx([max(0.0, 100 * float(image[0] @ words[0]))], abs=1e-3)
    how = replace(QUICK, tasks=("pictures",), prefix="seen-", clip_name=str(tmp_path / "clip"),
                  clip_weights=tmp_path / "clip/open_clip_pytorch_model.bin")
    model, _, raw = world()
    scores = evaluate(model, raw, tmp_path / "out", how)["tasks"]["pictures"]["scores"]
    assert {"seen/clip_score", "seen/clip_score of real pictures", "all/fid_clip:clip", "all/fd_teacher"} == set(scores)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    shards.write([Document("torn", (b"\x89PNG\r\n\x1a\n torn", "a star"))], tmp_path / "raw", "seen")
    with pytest.raises(ValueError, match=r"a picture of seen/torn is refused: .*mmllm data check"):
        evaluate(world()[0], tmp_path / "raw", tmp_path / "out", replace(QUICK, tasks=("captions",)))


def test_a_picture_is_a_pair_only_with_one_text() -> None:
    assert not Item("x", Document("k", (b"", "a", "b"))).is_pair and Item("x", Document("k", ("a", b""))).is_pair
    assert not Item("x", Document("k", ("a", b""), roles=("user", "assistant"))).is_pair


# Other people's tools -----------------------------------------------------------------------------------------------

def prompts_file(folder: Path) -> Path:
    path = folder / "evaluation_metadata.jsonl"
    lines = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
             {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_geneval_s_scorer_finds_its_layout_and_its_results_come_back_with_intervals(tmp_path: Path) -> None:
    model, _, _ = world()
    path, out = prompts_file(tmp_path), tmp_path / "out"
    how = Evaluation(tasks=("geneval",), geneval=path, geneval_n=2, resamples=100, device="cpu")
    first = evaluate(model, None, out, how)["tasks"]["geneval"]
    assert not first["scores"] and "evaluate_images.py" in first["missing"]["geneval"]
    folders = sorted(path.name for path in (out / "geneval").iterdir())
    assert folders == ["00000", "00001"]
    assert json.loads((out / "geneval/00001/metadata.jsonl").read_text()) == json.loads(path.read_text().splitlines()[1])
    assert sorted(p.name for p in (out / "geneval/00000/samples").iterdir()) == ["0000.png", "0001.png"]
    results = tmp_path / "results.jsonl"
    judged = (("00000", "single_object", (True, True)), ("00001", "counting", (True, False)))
    results.write_text("".join(
        json.dumps({"filename": str(out / f"geneval/{name}/samples/{i:04d}.png"), "tag": tag, "correct": right}) + "\n"
        for name, tag, both in judged for i, right in enumerate(both)))
    scores = evaluate(model, None, out, replace(how, geneval_results=results))["tasks"]["geneval"]["scores"]
    assert {what: score["value"] for what, score in scores.items()} == {
        "geneval/overall": 0.75, "geneval/single_object": 1.0, "geneval/counting": 0.5}
    assert read_results(results)["00001"] == ("counting", [True, False])


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: path.write_text('{"prompt": "a bench"}\n'), "line 1 is no prompt of GenEval"),
    (lambda path: None, "give --geneval the evaluation_metadata.jsonl")])
def test_what_is_no_list_of_geneval_s_is_refused(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / "p.jsonl")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        evaluate(world()[0], None, tmp_path / "out", Evaluation(tasks=("geneval",), geneval=tmp_path / "p.jsonl", device="cpu"))


def test_settings_that_cannot_be_are_refused_with_their_knob() -> None:
    with pytest.raises(ValueError, match="candidates is 1, the least is 2: give a larger --candidates"):
        Evaluation(candidates=1)
    with pytest.raises(ValueError, match="give both --clip-name and --clip-weights"):
        Evaluation(clip_name="ViT-B-32")
