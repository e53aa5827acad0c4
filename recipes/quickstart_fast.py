"""Every stage of the quick start in a few minutes: the same pipeline, learned less."""

from dataclasses import replace
from pathlib import Path

from mmllm.runs.quickstart import Quickstart
from mmllm.runs.train_tokenizer import TeacherTraining, TokenizerTraining, TrainTokenizer

RECIPE = replace(
    Quickstart(), out=Path("runs/quickstart_fast"), scenes=6_000, held=128, steps=160, save_every=80, sft_steps=20, prompts=100,
    tokenizer=TrainTokenizer(teacher=TeacherTraining(steps=60), tokenizer=TokenizerTraining(steps=25, start_patches=30_000)))
