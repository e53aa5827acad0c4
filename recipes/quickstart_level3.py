"""The quick start in a world without cells: 64 px, free positions, two sizes, textured grounds, up to four objects. For a GPU or a day."""

from dataclasses import replace
from pathlib import Path

from mmllm.config import Model, Optim
from mmllm.runs.tokenizer_recipe import Stage, Start, TrainTokenizer
from mmllm.runs.train_teacher import TeacherTraining
from recipes.quickstart_level2 import RECIPE as LEVEL2
from tokenizer.model import TokenizerConfig
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import TowerConfig

RECIPE = replace(
    LEVEL2, out=Path("runs/quickstart_level3"), level=3, scenes=200_000,
    tokenizer=TrainTokenizer(
        model=TokenizerConfig(tower=TowerConfig(image_size=64), quantizer=QuantizerConfig(codebook_size=2048)),
        teacher=TeacherTraining(steps=5000), align=Stage(steps=1000), start=Start(patches=400_000)),
    model=Model(num_layers=8, hidden_size=256, num_attention_heads=8, ffn_hidden_size=768, output_init_std=0.0),
    optim=Optim(lr=2e-3, warmup_steps=100, hold_ratio=0.5, betas=(0.9, 0.98)),
    global_batch=16, steps=20_000, sft_steps=1000)
