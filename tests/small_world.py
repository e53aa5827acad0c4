"""A folder of raw shards, tokenizers trained for a moment, and token shards: small, real, made once a test session."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

from data import shards
from data.document import texts_of
from data.encode import encode, fingerprint, vocab_of
from data.scenes import shards as scene_shards
from data.vocab import Vocab
from mmllm.runs.tokenizer_recipe import Stage, TrainTokenizer, TrainVisual
from mmllm.runs.train_teacher import TeacherTraining
from mmllm.runs.train_tokenizer import train
from tokenizer import text as texts
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import Teacher, TowerConfig
from tokenizer.text import TextTokenizer

RECIPE = TrainTokenizer(
    model=TokenizerConfig(tower=TowerConfig(width=32, layers=1, heads=2, embed_dim=16), channels=4,
                          quantizer=QuantizerConfig(codebook_size=64)),
    teacher=TeacherTraining(steps=6, batch=32), align=Stage(steps=4), batch=16, micro_batch=16, validate_every=2, revive_every=2)


class SmallWorld(NamedTuple):
    raw: Path
    tokens: Path
    text: TextTokenizer
    text_model: Path
    teacher: Teacher
    visual: VisualTokenizer
    visual_folder: Path
    vocab: Vocab
    fingerprint: str


@cache
def small_world() -> SmallWorld:
    """96 training documents in three shards, 16 of each held-out split."""
    folder = Path(mkdtemp(prefix="mmllm-small-world-"))
    raw = folder / "raw"
    scene_shards.write(raw, level=1, seed=0, train=96, held=16, shard_len=32)
    documents = list(shards.read_all(shards.find(raw, "train-")))
    text = texts.train([t for d in documents for t in texts_of(d)], 400)
    text.save(folder / "text.model")
    train(TrainVisual(raw=raw, text=folder / "text.model", out=folder / "visual_tokenizer", training=RECIPE))
    teacher, visual = Teacher.load(folder / "teacher.safetensors"), VisualTokenizer.load(folder / "visual_tokenizer")
    vocab = vocab_of(visual, text)
    encode(shards.find(raw), folder / "tokens", visual, text, vocab)
    return SmallWorld(raw, folder / "tokens", text, folder / "text.model", teacher, visual, folder / "visual_tokenizer", vocab,
                      fingerprint(visual.fingerprint, text.fingerprint, vocab))
