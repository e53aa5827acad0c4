"""The quick start on pictures of one's own: more codes and text pieces than scenes need. `mmllm quickstart --data` uses it."""

from pathlib import Path

from mmllm.runs.quickstart import Quickstart
from mmllm.runs.tokenizer_recipe import Stage, TrainTokenizer
from mmllm.runs.train_teacher import TeacherTraining
from tokenizer.model import TokenizerConfig
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import TowerConfig

RECIPE = Quickstart(
    out=Path("runs/quickstart_pictures"), text_pieces=2048,
    tokenizer=TrainTokenizer(
        model=TokenizerConfig(tower=TowerConfig(patch_size=4), channels=32,
                              quantizer=QuantizerConfig(codebook_size=1024, pixel_dims=(6, 16))),
        teacher=TeacherTraining(steps=200, lr=1e-3), align=Stage(steps=200, lr=1e-3)),
    steps=500, save_every=250)
