"""A megatron checkpoint → a Hugging Face model folder that needs nothing of ours to open."""

from pathlib import Path

from data.config import DataConfig
from data.encode import fingerprint
from data.loader import Loader
from mmllm import hf, weights
from tokenizer.text import TextTokenizer


def export(checkpoint: Path, out: Path, data: DataConfig, text_model: Path, visual_tokenizer: Path) -> Path:
    """Write the model of `checkpoint` with the tokenizers that its token shards were made by. → `out`

    Errors: ValueError where the tokenizers are not those of the shards, or the checkpoint misses a file."""
    vocab = Loader(data).vocab
    made_by = fingerprint(hf.fingerprint(visual_tokenizer), TextTokenizer.load(text_model).fingerprint, vocab)
    Loader(data, made_by)
    model, _ = weights.read_model(checkpoint)
    hf.write_folder(out, weights.export_weights(checkpoint), model, vocab, text_model, visual_tokenizer, chat=False)
    return out
