"""What is no tokenizer to adopt is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokenizer.text import TextTokenizer


def folder(path: Path, rows: Any = 300, **changes: Any) -> Path:
    """A tokenizer of the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (path / "tokenizer.json").write_text(json.dumps({**json.loads(fast.to_str()), **changes}))
    (path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return path


def test_all_rows_of_the_model_count(tmp_path: Path) -> None:
    text = TextTokenizer.load(folder(tmp_path))
    assert (text.size, text.used) == (300, 256) and text.decode(text.encode("a é")) == "a é"
    assert text.processor.id_to_piece(299) == "" and text.decode([299]) == ""


def test_what_would_cut_or_fill_texts_is_left_out(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(TextTokenizer.load(folder(tmp_path, truncation=cut)).encode("abcd")) == 4


@pytest.mark.parametrize(("changes", "words"), [
    ({"rows": 200}, "ids up to 255, its embedding 200 rows"), ({"rows": None}, "`vocab_size` in config.json"),
    ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}}, "of type Unigram"),
])
def test_a_tokenizer_that_cannot_be_extended_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TextTokenizer.load(folder(tmp_path, **changes))


def test_a_folder_without_one_and_a_broken_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        TextTokenizer.load(tmp_path)
    folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not JSON"):
        TextTokenizer.load(tmp_path)
