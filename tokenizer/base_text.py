"""The text tokenizer of a Hugging Face model, behind the methods of SentencePiece's processor that we call: text ids are those the model
was trained with.

A model's embedding may have more rows than its tokenizer has tokens (Qwen3: 151,936 and 151,669). All of them count: what we add starts
behind. Kept is one JSON document, `{"rows": T, "tokenizer": tokenizer.json}`.

A token that is special to the model (`<|im_start|>`) is only text when somebody types it; tokens that are added but not special
(`<think>`) are read as the model reads them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload


def adopted(folder: Path) -> bytes:
    """What is kept of a Hugging Face folder's tokenizer. Errors: FileNotFoundError, ValueError."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give a Hugging Face model folder; where there is only a tokenizer.model, "
                                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes one")
    config, tokenizer = _json((folder / "config.json").read_bytes(), str(folder / "config.json")), (folder / "tokenizer.json").read_bytes()
    kept = {"rows": config.get("vocab_size"), "tokenizer": {**_json(tokenizer, str(folder / "tokenizer.json")),
                                                            "truncation": None, "padding": None}}
    data = json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()
    BaseText(data, str(folder))
    return data


class BaseText:
    """A tokenizer that was adopted."""

    def __init__(self, data: bytes, source: str = "text tokenizer") -> None:
        from tokenizers import Tokenizer

        kept = _json(data, source)
        if not isinstance(kept.get("rows"), int) or not isinstance(kept.get("tokenizer"), dict):
            raise ValueError(f"{source} is no text tokenizer: needed are the model's `vocab_size` in config.json and its tokenizer.json, "
                             "or a file that `mmllm import` wrote")
        self.rows: int = kept["rows"]
        self.document: dict[str, Any] = kept["tokenizer"]
        kind = self.document.get("model", {}).get("type")
        if kind != "BPE":
            raise ValueError(f"{source}: its tokenizer is of type {kind}; Llama, Qwen2 and Qwen3 have BPE, others cannot be extended")
        self.tokenizer = Tokenizer.from_str(json.dumps(self.document))
        self.tokenizer.encode_special_tokens = True
        self.used = 1 + max(self.tokenizer.get_vocab().values())
        if self.used > self.rows:
            raise ValueError(f"{source}: its tokenizer has ids up to {self.used - 1:,}, its embedding {self.rows:,} rows: put the model's "
                             "own tokenizer beside it")

    def get_piece_size(self) -> int:
        return self.rows

    def id_to_piece(self, token_id: int) -> str:
        return self.tokenizer.id_to_token(token_id) or ""

    @overload
    def encode(self, text: str) -> list[int]: ...
    @overload
    def encode(self, text: Sequence[str], num_threads: int) -> list[list[int]]: ...
    def encode(self, text: str | Sequence[str], num_threads: int = 1) -> list[int] | list[list[int]]:
        """As many threads as TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS say: `num_threads` is SentencePiece's."""
        if isinstance(text, str):
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return [found.ids for found in self.tokenizer.encode_batch_fast(list(text), add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _json(data: bytes, source: str) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{source} is not JSON: {error}") from error
