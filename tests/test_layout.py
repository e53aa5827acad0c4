"""The tree shows the architecture: rooms look left, and heavy libraries stay where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("tokenizer", "data", "mmllm", "recipes", "tools")
HOMES = {  # library: where it may be imported
    "megatron": ("mmllm/megatron/",), "deepspeed": ("mmllm/runs/sft_engine.py",), "peft": ("mmllm/runs/sft_lora.py",),
    "open_clip": ("tokenizer/semantic.py", "tokenizer/clip_halves.py"), "timm": ("tokenizer/towers.py",),
    "transformers": ("tokenizer/towers.py", "mmllm/hf.py", "mmllm/runs/sft", "mmllm/evaluate/", "mmllm/generate/", "tools/"),
    "transformer_engine": ("mmllm/megatron/",), "lpips": ("tokenizer/perceptual.py",),
    "torch_fidelity": ("tokenizer/features.py",), "pytesseract": ("tokenizer/legibility.py",),
    "vllm": ("mmllm/generate/vllm_grammar.py",),
    "lm_eval": ("mmllm/evaluate/harness.py",), "pycocoevalcap": ("mmllm/evaluate/captions.py",),
    "imagehash": ("data/curate/signatures.py",),
    "fsspec": ("data/store.py",), "wandb": ("mmllm/run.py",), "pyarrow": ("data/formats/rows.py",),
    "fastapi": ("mmllm/serve/",), "starlette": ("mmllm/serve/",), "uvicorn": ("mmllm/serve/",), "pydantic": ("mmllm/serve/",),
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            plain = {alias.name for alias in node.names}
            assert not plain & {"data", "tokenizer"}, f"{path}: import a module of the room, not the room itself"
            names |= plain
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_is_left_of_it(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    right = ROOMS[ROOMS.index(name.split("/")[0]) + 1:]
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in right, f"{name} imports {module}, which is to its right"
        if top in HOMES:
            assert name.startswith(HOMES[top]), f"{name} imports {module}, which belongs in {HOMES[top]}"


def test_every_room_is_there() -> None:
    assert len(FILES) > 30
    assert all((ROOT / room).is_dir() for room in ROOMS)
