"""What the tests of instruction tuning run on: a small model folder with token shards of pairs and of conversations."""

import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch

from data.config import DataConfig
from data.document import Document, Role
from data.encode import fingerprint, write_manifest
from data.skipped import Skipped
from data.tokens import Coded, Documents, said_in, write
from mmllm import hf
from mmllm.runs.sft_recipe import Sft

KINDS = ("understanding", "generation", "editing", "mixed")
PICTURE = b""


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Small matrices on many threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `shards` of pairs, and `talk` of conversations, a shard of each kind and a held-out one, that belong together."""
    folder = tmp_path_factory.mktemp("sft")
    tiny_model.folder(folder / "model", std=0.08)
    tiny_model.token_shards(folder / "shards", documents=40)
    conversations(folder / "talk")
    return folder


def stock(folder: Path) -> Any:
    """The model of a folder as transformers builds it."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def recipe(world: Path, out: Path, **changes: object) -> Sft:
    data = DataConfig(shards=world / "shards", row_len=192, draw_ratio=0.5)
    base = Sft(out=out, init=world / "model", data=data, steps=6, global_batch=4, lr=3e-3, warmup_steps=2,
               precision="fp32", log_every=1)
    return replace(base, **changes)  # type: ignore[arg-type]


def talk(world: Path, prefix: str = "") -> DataConfig:
    return DataConfig(shards=world / "talk", prefix=prefix or "understanding", row_len=192)


def conversation(kind: str, number: int, words: Callable[[], str]) -> Document:
    """Of one or two exchanges, every other one behind a system's turn."""
    turns: dict[str, list[tuple[Role, str | bytes]]] = {
        "understanding": [("user", PICTURE), ("user", words()), ("assistant", words())],
        "generation": [("user", words()), ("assistant", PICTURE)],
        "editing": [("user", PICTURE), ("user", words()), ("assistant", PICTURE)],
        "mixed": [("user", words()), ("assistant", words()), ("assistant", PICTURE), ("user", words()), ("assistant", words())]}
    said: list[tuple[Role, str | bytes]] = [*([("system", words())] if number % 2 else []), *turns[kind]]
    if number % 3 == 0:
        said += turns["understanding"]
    return Document(f"{kind}-{number:04d}", tuple(part for _, part in said), roles=tuple(role for role, _ in said))


def documents(kind: str, count: int) -> list[Document]:
    words = iter(tiny_model.sentences(10 * count, seed=KINDS.index(kind)))
    return [conversation(kind, number, lambda: next(words)) for number in range(count)]


def codes(kind: str, number: int) -> np.ndarray:
    """[M, h, w] of a shard's picture `number`."""
    return np.random.default_rng([KINDS.index(kind), number]).integers(0, 48, (2, 3, 3))


def conversations(out: Path, count: int = 24) -> Path:
    """Token shards of every kind, and `val`, which is one of understanding."""
    vocab, text = tiny_model.vocabulary(), tiny_model.text_tokenizer()
    name = fingerprint(hf.fingerprint(tiny_model.saved_visual_tokenizer(out.parent, 2, 48)), text.fingerprint, vocab)
    out.mkdir(parents=True)
    shards: list[Path] = []
    for kind, prefix in [(kind, kind) for kind in KINDS] + [("understanding", "val")]:
        raw = documents(kind, count)
        pictures = sum(isinstance(part, bytes) for document in raw for part in document.parts)
        coded = {number: Coded((3, 3), vocab.image_ids(codes(kind, number))) for number in range(pictures)}
        shards.append(out / f"{prefix}-000000.tar")
        write(shards[-1], Documents(raw, said_in(raw, text), Skipped()), coded, name)
    write_manifest(out, shards, name, vocab)
    return out


def start(settings: Sft, folder: Path) -> subprocess.Popen[bytes]:
    """The run in a process of its own, whose whole group can be killed."""
    (folder / "recipe.pickle").write_bytes(pickle.dumps(settings))
    code = "import pickle, sys; from mmllm.runs.sft import main; main(pickle.load(open(sys.argv[1], 'rb')))"
    return subprocess.Popen([sys.executable, "-c", code, str(folder / "recipe.pickle")], start_new_session=True,
                            stdout=subprocess.DEVNULL)


def wait_for(found: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    for _ in range(2400):
        if found() or process.poll() is not None:
            return
        time.sleep(0.05)
