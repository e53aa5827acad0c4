"""The Hugging Face folder of a model: what `AutoModelForCausalLM` and `AutoTokenizer` open, and what our engine adds.

    config.json, generation_config.json, model*.safetensors    a stock Llama, Qwen2 or Qwen3, vocabulary unpadded
    tokenizer.json, tokenizer_config.json                      text pieces, control tokens and image codes in one
    vocab.json, text.model, visual_tokenizer/, mmllm.json      ours: id ranges, text model, pictures, fingerprints

Two tokenizers must give one and the same ids: `text.model`, what the model was trained with (SentencePiece, or the adopted tokenizer of
the model it started from), and the fast tokenizer built from it. A folder is written beside its place and renamed: none reads half of one.
"""

import hashlib
import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.vocab import Vocab
from mmllm import streams
from mmllm.config import Model
from mmllm.hf_config import model_config, read_model
from mmllm.hf_text import write_tokenizer
from mmllm.manifest import sync
from tokenizer.text import TextTokenizer

FORMAT = 1
SHARD_BYTES = 5_000_000_000
MAX_LEN = 32_768
"""Tokens that a model reads unless something says otherwise."""
OURS = ("mmllm.json", "config.json", "vocab.json", "text.model", "tokenizer.json", "visual_tokenizer")


@dataclass(frozen=True)
class Folder:
    """An opened model folder; weights are read when asked for."""

    path: Path
    config: dict[str, Any]
    vocab: Vocab
    text: TextTokenizer
    chat: bool
    """Tuned on conversations: prompts are turns. Otherwise they are plain documents."""

    @property
    def visual_tokenizer(self) -> Path:
        return self.path / "visual_tokenizer"

    @property
    def model(self) -> Model:
        return read_model(self.config)

    @property
    def max_len(self) -> int:
        return int(self.config["max_position_embeddings"])

    def tensors(self) -> dict[str, Tensor]:
        """All weights by Hugging Face name."""
        tensors = {name: tensor.make() for name, tensor in streams.read(self.path).items()}
        rows = tensors["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in tensors else 0
        if rows != self.vocab.size:
            raise ValueError(f"{self.path}: the weights embed {rows:,} tokens, vocab.json has {self.vocab.size:,}")
        return tensors


def open_folder(path: Path) -> Folder:
    """Check a model folder and open all but its weights. Errors: FileNotFoundError, ValueError; one line each."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no model folder {path}")
    if not (path / "mmllm.json").is_file():
        found = "it has a config.json but no mmllm.json: " if (path / "config.json").is_file() else ""
        raise ValueError(f"{path} is not a model folder: {found}give one that `mmllm export` or a tuning run wrote")
    for name in OURS:
        if not (path / name).exists():
            raise FileNotFoundError(f"model folder {path} has no {name}: export it again")
    streams.weight_files(path)
    ours, config = _json(path / "mmllm.json"), _json(path / "config.json")
    if ours.get("format") != FORMAT:
        raise ValueError(f"{path}/mmllm.json has format {ours.get('format')}, this version reads {FORMAT}")
    text, vocab = TextTokenizer.load(path / "text.model"), Vocab.load(path / "vocab.json")
    for name, now in (("text.model", text.fingerprint), ("visual_tokenizer", fingerprint(path / "visual_tokenizer"))):
        if ours["fingerprints"][name] != now:
            raise ValueError(f"{path}/{name} has fingerprint {now}, the model was trained with "
                             f"{ours['fingerprints'][name]}: put the right one back or export again")
    if text.size != vocab.text_size:
        raise ValueError(f"{path}: text.model has {text.size:,} pieces, vocab.json says {vocab.text_size:,}")
    if config["vocab_size"] != vocab.size:
        raise ValueError(f"{path}: config.json has vocab_size {config['vocab_size']:,}, vocab.json has {vocab.size:,}")
    return Folder(path, config, vocab, text, bool(ours["chat"]))


def write_folder(out: Path, tensors: streams.Tensors, model: Model, vocab: Vocab, text_model: Path,
                 visual_tokenizer: Path, chat: bool, max_len: int = MAX_LEN) -> None:
    """Write a model folder whole or not at all. tensors: Hugging Face names, vocabulary without padding rows."""
    text = TextTokenizer.load(text_model)
    if text.size != vocab.text_size:
        raise ValueError(f"{text_model} has {text.size:,} pieces, the vocabulary {vocab.text_size:,}")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors and tensors[name].shape[0] != vocab.size:
            raise ValueError(f"{name} has {tensors[name].shape[0]:,} rows, the vocabulary {vocab.size:,} tokens: "
                             "drop the padding rows")
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    ends = {"bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "pad_token_id": vocab.pad}
    with replaced(out) as folder:
        _dump(folder / "config.json", {**model_config(model, vocab.size, max_len), **ends, "dtype": dtype})
        # a user's turn ends an answer too: pretraining documents ask on
        _dump(folder / "generation_config.json", {**ends, "eos_token_id": [vocab.eos, vocab.user]})
        streams.write(folder, tensors, SHARD_BYTES)
        write_tokenizer(folder, text, vocab, qwen2=model.qkv_bias)
        vocab.save(folder / "vocab.json")
        text.save(folder / "text.model")
        shutil.copytree(visual_tokenizer, folder / "visual_tokenizer")
        _dump(folder / "mmllm.json", {"format": FORMAT, "chat": chat, "fingerprints": {
            "text.model": text.fingerprint, "visual_tokenizer": fingerprint(folder / "visual_tokenizer")}})


def fingerprint(folder: Path) -> str:
    """`VisualTokenizer.fingerprint` of a saved one, without building it: SHA-256 of configuration and weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"visual tokenizer {folder} has no {name}")
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def check_target(out: Path, mark: str = "mmllm.json") -> None:
    """Refuse to write over something that is no model folder, or not what has a file `mark`."""
    if out.exists() and not (out / mark).is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is {'not a model folder' if mark == 'mmllm.json' else f'a folder without {mark}'}: "
                         "give another place, nothing was written")


@contextmanager
def replaced(out: Path, mark: str = "mmllm.json") -> Generator[Path]:
    """A new folder to fill; it takes the place of `out` when the block ends well, and is gone when it does not."""
    check_target(out, mark)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in (p for p in partial.rglob("*") if p.is_file()):
        sync(path)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
