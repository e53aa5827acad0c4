"""A megatron checkpoint → a Hugging Face model folder that needs nothing of ours to open."""

import json
from pathlib import Path

import torch

from data.config import DataConfig
from data.encode import fingerprint
from data.loader import Loader
from data.vocab import Vocab
from mmllm import hf, weights
from mmllm.manifest import read_state
from tokenizer.text import TextTokenizer


def export(checkpoint: Path, out: Path, data: DataConfig | None, text_model: Path | None, visual_tokenizer: Path,
           dtype: torch.dtype | None = None) -> Path:
    """Write the model of `checkpoint` with the tokenizers that its token shards were made by. → `out`

    What `mmllm import` wrote has its vocabulary and text tokenizer in it and needs no `data` and no `text_model`.
    Errors: ValueError where the tokenizers are not those of the shards, or the checkpoint misses a file."""
    model, _ = weights.read_model(checkpoint)
    text_model = text_model or checkpoint / "text.model"
    if data is None and not (checkpoint / "vocab.json").is_file():
        raise ValueError(f"{checkpoint} does not say what its ids mean: name the token shards it was trained on, and their text tokenizer")
    if not text_model.exists():
        raise FileNotFoundError(f"there is no text tokenizer {text_model}: name the one that the token shards were made with")
    vocab = Vocab.load(checkpoint / "vocab.json") if data is None else Loader(data).vocab
    if data is not None:
        Loader(data, fingerprint(hf.fingerprint(visual_tokenizer), TextTokenizer.load(text_model).fingerprint, vocab))
    hf.write_folder(out, weights.export_weights(checkpoint, dtype), model, vocab, text_model, visual_tokenizer, chat=False,
                    max_len=_max_len(checkpoint))
    return out


def _max_len(checkpoint: Path) -> int:
    """Tokens that the model reads: those of the base it was imported from, if it was."""
    begun = read_state(checkpoint)["recipe"].get("init")
    for folder in (checkpoint, *([Path(begun)] if begun else [])):
        if (folder / "base.json").is_file():
            return int(json.loads((folder / "base.json").read_bytes()).get("max_position_embeddings", hf.MAX_LEN))
    return hf.MAX_LEN
