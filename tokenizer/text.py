"""Text ↔ ids: a SentencePiece BPE model trained on the captions, without tokens of its own besides <unk>, or the tokenizer of a
language model that is trained on (`tokenizer.base_text`).

Begin, end, padding and pictures are control tokens of `data.vocab`, so one text model serves any vocabulary around it.
The settings (identity normalization, byte fallback) are those that a `tokenizers` BPE model reproduces exactly,
so the exported Hugging Face tokenizer gives the same ids.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece as spm

from tokenizer.base_text import BaseText, adopted


class TextTokenizer:
    """A trained SentencePiece model, or an adopted tokenizer: a JSON document."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.processor = BaseText(model) if model.startswith(b"{") else spm.SentencePieceProcessor(model_proto=model)

    @property
    def size(self) -> int:
        """T: number of pieces; of an adopted tokenizer, rows of its model's embedding."""
        return self.processor.get_piece_size()

    @property
    def used(self) -> int:
        """Pieces that a text can have; behind them an embedding may have rows that no text asks for."""
        return self.processor.used if isinstance(self.processor, BaseText) else self.size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, 16 hex digits."""
        return hashlib.sha256(self.model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """What `encode` gives for each, in one call on one thread; a text that comes again is encoded once."""
        known = list(dict.fromkeys(texts))
        ids = dict(zip(known, self.processor.encode(known, num_threads=1), strict=True))
        return [ids[text] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def save(self, path: Path) -> None:
        Path(path).write_bytes(self.model)

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """A file that `save` wrote, or a Hugging Face folder."""
        path = Path(path)
        return cls(adopted(path) if path.is_dir() else path.read_bytes())


def train(texts: Iterable[str], size: int) -> TextTokenizer:
    """Train on `texts` up to `size` pieces, of which 256 are bytes; a small world that has fewer to merge ends below.

    Byte-pair merges (Sennrich et al. 2016, arXiv:1508.07909) with byte fallback, as Llama's. On a few templates the unigram
    trainer keeps frequent words in letters (8.3 pieces a caption of the quick start against 5.6)."""
    texts = list(texts)
    out = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, vocab_size=size, model_type="bpe",
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
            byte_fallback=True, character_coverage=1.0, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0,
            num_threads=1, minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"<= (\d+)", str(error))  # what the trainer says it can fill
        if limit is None or int(limit[1]) >= size:
            raise
        return train(texts, int(limit[1]))
    return TextTokenizer(out.getvalue())
