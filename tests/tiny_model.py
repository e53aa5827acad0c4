"""A whole model folder in a second: real tokenizers and a real vocabulary around random weights."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.document import Document
from data.encode import fingerprint, vocab_of, write_manifest
from data.skipped import Skipped
from data.tokens import Coded, Documents, said_in, write
from data.vocab import Vocab
from mmllm import hf
from mmllm.config import Model
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.quantize import QuantizerConfig, TextEmbedding
from tokenizer.semantic import TowerConfig
from tokenizer.text import TextTokenizer, train

WORDS = ["a", "red", "green", "blue", "circle", "square", "star", "above", "below", "left", "right", "of", "two",
         "three", "how", "many", "what", "colour", "is", "the", "background", "draw", "describe", "picture", "please",
         "do", "you", "see", "in"]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 10))) + rng.choice([".", "?", ""]) for _ in range(count)]


@cache
def text_tokenizer() -> TextTokenizer:
    return train(sentences(2000), 340)


@cache
def visual_tokenizer(books: int = 2, codes: int = 48) -> VisualTokenizer:
    torch.manual_seed(0)
    tower = TowerConfig(image_size=24, patch_size=8, width=16, layers=1, heads=2, text_layers=1, embed_dim=8)
    quantizer = QuantizerConfig(codebook_size=codes, pixel_dims=(8,) * books, semantic_dim=4)
    config = TokenizerConfig(tower=tower, quantizer=quantizer, pixel="linear", channels=8, blocks=1)
    pieces = text_tokenizer().size
    return VisualTokenizer(config, TextEmbedding(torch.randn(pieces, 16), torch.arange(pieces), 16)).eval()


def vocabulary(books: int = 2, codes: int = 48) -> Vocab:
    return Vocab(text_size=text_tokenizer().size, codebook_size=codes, num_books=books, grids=((3, 3), (2, 3)))


def model(**changes: object) -> Model:
    fields: dict[str, object] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
                                 "ffn_hidden_size": 48, "norm_eps": 1e-5}
    return Model(**{**fields, **changes})  # type: ignore[arg-type]


def weights(shape: Model, vocab_size: int, std: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under Hugging Face names; wide enough that logits differ."""
    torch.manual_seed(seed)
    d, f, k = shape.hidden_size, shape.ffn_hidden_size, shape.head_width
    q, kv = shape.num_attention_heads * k, shape.groups * k
    sizes = {"model.embed_tokens.weight": (vocab_size, d), "model.norm.weight": (d,)}
    if not shape.tie_embeddings:
        sizes["lm_head.weight"] = (vocab_size, d)
    for i in range(shape.num_layers):
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d),
                 "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
                 "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        if shape.qk_layernorm:
            layer |= {"self_attn.q_norm": (k,), "self_attn.k_norm": (k,)}
        sizes |= {f"model.layers.{i}.{name}.weight": size for name, size in layer.items()}
    return {name: torch.randn(size) * std + (1.0 if len(size) == 1 else 0.0) for name, size in sizes.items()}


def folder(out: Path, chat: bool = False, books: int = 2, codes: int = 48, std: float = 0.3, **changes: object) -> Path:
    """Write a model folder to `out`."""
    vocab, shape = vocabulary(books, codes), model(**changes)
    visual = saved_visual_tokenizer(out.parent, books, codes)
    text_tokenizer().save(out.parent / "text.model")
    hf.write_folder(out, weights(shape, vocab.size, std), shape, vocab, out.parent / "text.model", visual, chat, 512)
    return out


def saved_visual_tokenizer(beside: Path, books: int, codes: int) -> Path:
    folder = beside / f"visual-{books}-{codes}"
    if not folder.is_dir():
        visual_tokenizer(books, codes).save(folder)
    return folder


def token_shards(out: Path, documents: int = 60, books: int = 2, codes: int = 48,
                 grid: tuple[int, int] = (3, 3), text: TextTokenizer | None = None) -> Path:
    """One token shard of pictures (random codes) with a text, a caption and two questions, for the tokenizers here or another `text`."""
    vocab = vocabulary(books, codes) if text is None else vocab_of(visual_tokenizer(books, codes), text)
    text = text or text_tokenizer()
    rng, words = np.random.default_rng(0), iter(sentences(8 * documents, seed=1))
    raw = [Document(f"{number:06d}", (b"", next(words)), captions=(next(words),),
                    questions=((next(words), next(words)), (next(words), next(words)))) for number in range(documents)]
    pictures = {number: Coded(grid, vocab.image_ids(rng.integers(0, codes, (books, *grid)))) for number in range(documents)}
    name = fingerprint(hf.fingerprint(saved_visual_tokenizer(out.parent, books, codes)), text.fingerprint, vocab)
    out.mkdir(parents=True)
    shard = out / "train-000000.tar"
    write(shard, Documents(raw, said_in(raw, text), Skipped()), pictures, name)
    write_manifest(out, [shard], name, vocab)
    return out
