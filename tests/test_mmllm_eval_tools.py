"""Other people's tools read what we export and serve: lm-evaluation-harness the folder, lmms-eval's form of a question the server."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model

from data import shards
from data.images import fitted, to_array, to_png, to_tensor
from data.scenes import shards as scene_shards
from data.tokens import sizes_of
from mmllm.evaluate.client import ask, payload
from mmllm.evaluate.model import evaluate
from mmllm.evaluate.settings import Evaluation

CHOICE = """task: tiny_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CORPUS = """task: tiny_corpus
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def define(folder: Path) -> Path:
    """Two tasks on a file of this machine."""
    folder.mkdir()
    lines = [{"text": text, "choices": [" a star", " a ring"], "answer": n % 2} for n, text in enumerate(tiny_model.sentences(6, seed=4))]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / "texts.jsonl"}}}}}\ntest_split: test\n'
    (folder / "choice.yaml").write_text(CHOICE + source + 'doc_to_text: "{{text}}"\n')
    (folder / "corpus.yaml").write_text(CORPUS + source + 'doc_to_text: ""\n')
    return folder


def test_the_harness_s_own_numbers_are_ours_and_ours_have_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = tiny_model.folder(tmp_path / "model", chat=True)
    how = Evaluation(tasks=("text",), lm_tasks=("tiny_choice", "tiny_corpus"), lm_folder=define(tmp_path / "tasks"), device="cpu",
                     resamples=100)
    scores = evaluate(model, None, tmp_path / "out", how)["tasks"]["text"]["scores"]
    lines = map(json.loads, (tmp_path / "out/records/text.jsonl").read_text().splitlines()[1:])
    theirs = {f"{name}/{metric.removesuffix(',none')}": value for line in lines for name, task in line["tasks"].items()
              for metric, value in task["harness"].items() if metric != "sample_len"}
    assert {"tiny_choice/acc", "tiny_corpus/bits_per_byte", "tiny_corpus/word_perplexity"} <= set(scores) and set(scores) <= set(theirs)
    for name, score in scores.items():
        assert score["value"] == pytest.approx(theirs[name], rel=1e-6) and score["units"] == 6
        assert score["better"] == (1 if name.endswith("acc") else -1)


def test_a_task_whose_data_is_elsewhere_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, folder = tiny_model.folder(tmp_path / "model"), define(tmp_path / "tasks")
    (folder / "texts.jsonl").unlink()
    how = Evaluation(tasks=("text",), lm_tasks=("tiny_choice",), lm_folder=folder, device="cpu")
    with pytest.raises(ValueError, match=r"cannot run 'tiny_choice'.*whose data is on this machine"):
        evaluate(model, None, tmp_path / "out", how)


# The server ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def listener() -> Iterator[tuple[str, list[Any]]]:
    """A server that keeps what it is sent and answers as it is told."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            status, answer = (400, {"error": {"message": "too long"}}) if len(seen) == 2 else (
                200, {"choices": [{"message": {"role": "assistant", "content": "a star"}}]} if len(seen) == 1 else {})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()


def test_a_question_has_the_form_of_lmms_eval_s(listener: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    (address, seen), file = listener, to_png(np.zeros((2, 3, 3), np.uint8))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert ask(address, [file], "what is it?", 16) == "a star"
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    # lmms_eval/models/chat/openai.py and ChatMessages.to_openai_messages of lmms-eval 0.7.3
    assert body == {"model": "mmllm", "max_tokens": 16, "temperature": 0, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file).decode()}},
        {"type": "text", "text": "what is it?"}]}]}
    with pytest.raises(ValueError, match=r"answered 400: .*too long"):
        ask(address, [], "?", 1)
    with pytest.raises(ValueError, match=r"gave no answer .*KeyError"):
        ask(address, [], "?", 1)
    with pytest.raises(ValueError, match="start `mmllm serve MODEL`, or mend --server"):
        ask("http://127.0.0.1:1/v1", [], "?", 1)


def test_a_picture_that_is_no_png_is_sent_as_one() -> None:
    jpeg = base64.b64decode(  # 1 × 1 px
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP////////////////////////////////////////////////////////////////////////////////////"
        "//wAALCAABAAEBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACf/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AKp//2Q==")
    url = payload([jpeg], "?", 1, "m")["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]).startswith(b"\x89PNG")


def test_our_server_answers_over_the_wire_as_the_engine_does(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    import serving

    scene_shards.write(tmp_path / "raw", level=1, seed=0, train=1, held=2)
    engine = serving.drawer(tmp_path / "model")
    with serving.serving(engine) as served:
        how = Evaluation(tasks=("served",), prefix="seen-", server=f"{served.url}/v1", max_text=6, resamples=100, device="cpu")
        record = evaluate(tmp_path / "model", tmp_path / "raw", tmp_path / "out", how)["tasks"]["served"]
    assert record["scores"]["seen/overall"]["units"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out/records/served.jsonl").read_text().splitlines()[1:]]
    documents = {f"seen/{document.key}": document for document in shards.read(tmp_path / "raw/seen-000000.tar")}
    same = 0
    for line in lines:
        picture = next(part for part in documents[line["name"]].parts if isinstance(part, bytes))
        codes = engine.codes(to_tensor(to_array(fitted(picture, sizes_of(engine.visual)))[None]))
        for answer in line["answers"]:
            if "![picture]" not in answer["said"]:  # this model would rather draw, and lmms-eval has no word against it
                assert answer["said"].strip() == engine.describe(codes, answer["question"], max_text=6)[0].strip()
                same += 1
    assert same
