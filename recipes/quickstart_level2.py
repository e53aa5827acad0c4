"""The quick start in a richer world, for about an hour of two cores: 48 px, nine cells, up to four objects, 8 shapes × 8 colours."""

from pathlib import Path

from mmllm.config import Model, Optim
from mmllm.runs.quickstart import Quickstart
from mmllm.runs.tokenizer_recipe import Stage, Start, TrainTokenizer
from mmllm.runs.train_teacher import TeacherTraining
from tokenizer.model import TokenizerConfig
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import TowerConfig

RECIPE = Quickstart(
    out=Path("runs/quickstart_level2"), level=2, scenes=100_000,
    tokenizer=TrainTokenizer(
        model=TokenizerConfig(tower=TowerConfig(image_size=48), quantizer=QuantizerConfig(codebook_size=512)),
        teacher=TeacherTraining(steps=800), align=Stage(steps=100), start=Start(patches=120_000)),
    model=Model(num_layers=5, hidden_size=160, num_attention_heads=5, ffn_hidden_size=448, output_init_std=0.0),
    optim=Optim(lr=3e-3, warmup_steps=100, hold_ratio=0.5, betas=(0.9, 0.98)),
    row_len=2048, global_batch=4, steps=6000, save_every=1000, sft_steps=300)
