"""Every stage of the quick start in a few minutes: the same pipeline, learned less."""

from dataclasses import replace
from pathlib import Path

from mmllm.runs.quickstart import Quickstart
from mmllm.runs.tokenizer_recipe import Stage, Start, TrainTokenizer
from mmllm.runs.train_teacher import TeacherTraining

RECIPE = replace(
    Quickstart(), out=Path("runs/quickstart_fast"), scenes=6_000, held=128, steps=160, save_every=80, sft_steps=20, prompts=100,
    tokenizer=TrainTokenizer(teacher=TeacherTraining(steps=60), align=Stage(steps=25), start=Start(patches=30_000)))
