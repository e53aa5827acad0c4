"""Batch jobs go on where they were; the best of several is the one the model would describe so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from PIL import Image

from data import chat
from data.vocab import Vocab
from mmllm import cli, hf
from mmllm.generate import jobs
from mmllm.generate.best import agreement
from mmllm.generate.engine import Engine
from mmllm.generate.jobs import Drawing
from mmllm.generate.sample import Sampling


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its grid is the one that the tiny visual tokenizer paints."""
    folder, shape = tmp_path_factory.mktemp("jobs"), tiny_model.model()
    vocab: Vocab = replace(tiny_model.vocabulary(), grids=((3, 3),))
    tiny_model.text_tokenizer().save(folder / "text.model")
    hf.write_folder(folder / "model", tiny_model.weights(shape, vocab.size), shape, vocab, folder / "text.model",
                    tiny_model.saved_visual_tokenizer(folder, 2, 48), True, 512)
    return Engine.load(folder / "model", "cpu")


def prompts(path: Path, count: int = 5) -> Path:
    lines: list[dict[str, object]] = [{"prompt": words} for words in tiny_model.sentences(count)]
    lines[1] |= {"id": "mine", "n": 3, "seed": 4, "guidance": 2, "temperature": 2.0, "negative": "a red star", "grid": [3, 3]}
    lines[2] |= {"n": 2, "best_of": 4}
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_a_job_that_was_stopped_gives_what_one_that_ran_through_gives(engine: Engine, tmp_path: Path) -> None:
    source, seen = prompts(tmp_path / "p.jsonl"), list[tuple[int, int]]()
    assert jobs.generate(engine, source, tmp_path / "whole", Drawing(temperature=1.0), 2, tell=lambda *done: seen.append(done)) == 5
    assert seen == [(0, 5), (5, 5)]
    jobs.generate(engine, source, tmp_path / "cut", Drawing(temperature=1.0), 2)
    log = tmp_path / "cut" / "pictures.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:2]) + '{"id": "0000')  # as a crash leaves it
    assert jobs.generate(engine, source, tmp_path / "cut", Drawing(temperature=1.0), 2) == 3
    assert jobs.generate(engine, source, tmp_path / "cut", Drawing(temperature=1.0), 2) == 0
    whole, cut = (sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir()) for name in ("whole", "cut"))
    assert whole == cut and len(whole) == 1 + 8
    assert Image.open(tmp_path / "whole" / "mine-2.png").size == (48, 48)
    scores = [line["scores"] for line in map(json.loads, log.read_text().splitlines()) if "scores" in line]
    assert len(scores) == 1 and scores[0] == sorted(scores[0], reverse=True)


def test_a_job_with_other_settings_needs_another_place(engine: Engine, tmp_path: Path) -> None:
    source = prompts(tmp_path / "p.jsonl")
    jobs.generate(engine, source, tmp_path / "out", Drawing())
    with pytest.raises(ValueError, match="give another --out"):
        jobs.generate(engine, source, tmp_path / "out", Drawing(seed=1))


@pytest.mark.parametrize(("line", "message"), [
    ("{", "is no JSON"), ("[1]", "is no JSON object"), ('{"text": "x"}', 'needs a "prompt"'), ('{"prompt": " "}', "no text"),
    ('{"prompt": "x", "n": "many"}', "n is 'many'"), ('{"prompt": "x", "n": 0}', "n 0"), ('{"prompt": "x", "grid": [3]}', r"\[h, w\]"),
    ('{"prompt": "x", "grid": [9, 9]}', "9x9"), ('{"prompt": "x", "id": "../y"}', "no file name"),
    ('{"prompt": "x", "n": 2, "best_of": 1}', "best_of 1")])
def test_a_wrong_line_is_named_before_anything_is_drawn(engine: Engine, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        jobs.generate(engine, tmp_path / "p.jsonl", tmp_path / "out", Drawing())
    assert not list(tmp_path.glob("out/*.png"))


def test_pictures_of_a_folder_or_a_file_are_described_as_one_by_one(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 40), colour).save(tmp_path / "in" / ("deep" if number else ".") / f"{number}.png")
    (tmp_path / "in" / "no.png").write_text("hello")
    assert jobs.describe(engine, tmp_path / "in", tmp_path / "out.jsonl") == 4
    said = {line["id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert "does not decode" in said["no.png"]["error"] and said["0.png"]["text"] == one(engine, tmp_path / "in" / "0.png", None)
    asks = [{"picture": "in/0.png", "question": "how many?"}, {"picture": "in/deep/1.png"}, {"picture": "x.png"}]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(ask) + "\n" for ask in asks))
    assert jobs.describe(engine, tmp_path / "ask.jsonl", tmp_path / "asked.jsonl") == 3
    asked = {line["id"]: line for line in map(json.loads, (tmp_path / "asked.jsonl").read_text().splitlines())}
    assert asked["000001"]["text"] == one(engine, tmp_path / "in" / "0.png", "how many?") and "error" in asked["000003"]
    assert asked["000002"]["text"] == said["deep/1.png"]["text"]
    assert jobs.describe(engine, tmp_path / "ask.jsonl", tmp_path / "asked.jsonl") == 0


def one(engine: Engine, path: Path, question: str | None) -> str:
    from data.images import fitted, to_array, to_tensor
    return engine.describe(to_tensor(to_array(fitted(path, 24))[None]), question)[0]


def test_agreement_is_the_likelihood_of_the_prompt_as_a_description(engine: Engine) -> None:
    words, vocab = ["a red star", "please draw two blue squares above a green circle"], engine.folder.vocab
    codes = engine.draw(words, n=3, sampling=Sampling(temperature=3.0))
    scores = agreement(replace(engine, batch=4), words, codes, "caption")
    for prompt, row, pictures in zip(words, scores, codes, strict=True):
        said = engine.folder.text.encode(prompt.removeprefix("please draw "))
        for score, picture in zip(row, pictures, strict=True):
            shown = [{"type": "image", "codes": picture}, {"type": "text", "text": chat.DESCRIBE_REQUESTS[0]}]
            ids = chat.prompt([{"role": "user", "content": shown}], vocab, engine.folder.text.encode)
            slow = 0.0
            for token in said:
                hidden, _ = engine.decoder.start([ids], 0)
                slow += float(engine.decoder.logits(hidden, 0, vocab.first_image)[0].log_softmax(-1)[token])
                ids = [*ids, token]
            assert score == pytest.approx(slow, abs=1e-3)


def test_the_other_judge_is_the_likelihood_of_the_picture(engine: Engine) -> None:
    words, vocab = ["a red star", "how many blue squares above the green circle"], engine.folder.vocab
    codes = engine.draw(words, n=2, sampling=Sampling(temperature=3.0))
    scores = agreement(replace(engine, batch=3), words, codes)
    for prompt, row, pictures in zip(words, scores, codes, strict=True):
        for score, picture in zip(row, pictures, strict=True):
            ids, slow = list(engine.draw_requests(prompt)[0].prompt), 0.0
            for place, token in enumerate(vocab.image_ids(picture).tolist()):
                low = vocab.first_image + place % 2 * vocab.codebook_size
                logits = engine.decoder.logits(engine.decoder.start([ids], 0)[0], low, low + vocab.codebook_size)[0]
                slow, ids = slow + float(logits.log_softmax(-1)[token - low]), [*ids, token]
            assert score == pytest.approx(slow, abs=1e-3)


def test_the_best_of_n_are_the_same_pictures_in_the_models_order(engine: Engine) -> None:
    found = jobs.draw(engine, ["a red star", "how"], [Drawing(n=5, best_of=5, temperature=3.0, seed=2)] * 2)
    drawn = engine.draw(["a red star", "how"], n=5, sampling=Sampling(temperature=3.0), seed=2)
    assert all(scores == sorted(scores, reverse=True) and len(scores) == 5 for _, scores in found)
    assert [sorted(x.tobytes() for x in codes) for codes, _ in found] == [sorted(x.tobytes() for x in codes) for codes in drawn]


def test_the_command_draws_the_engines_picture(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(engine.folder.path)
    cli.run(["generate", place, "a red star", "--out", str(tmp_path / "x.png"), "--scale", "1", "--temperature", "2", "--top-k", "9",
             "--guidance", "2", "--negative", "how", "--seed", "5"])
    codes = engine.draw(["a red star"], guidance=2.0, sampling=Sampling(temperature=2.0, top_k=9), seed=5, negative="how")
    assert torch.allclose(torch.from_numpy(np.asarray(Image.open(tmp_path / "x.png")).astype(np.float32)),
                          ((engine.pictures(codes)[0, 0] + 1) * 127.5).clamp(0, 255).round().movedim(0, -1), atol=1)
    cli.run(["generate", place, "a red star", "--out", str(tmp_path / "y.png"), "--n", "2", "--ahead", "8", "--ahead-delta", "0.2",
             "--int8"])
    assert (tmp_path / "y-1.png").is_file()
    cli.run(["generate", place, "--prompts", str(prompts(tmp_path / "p.jsonl")), "--out", str(tmp_path / "many")])
    cli.run(["describe", place, str(tmp_path / "many"), "--out", str(tmp_path / "d.jsonl")])
    assert "5 prompts drawn" in (said := capsys.readouterr().out) and "8 pictures described" in said
    with pytest.raises(ValueError, match="give a prompt, or a file"):
        cli.run(["generate", place])
