"""The visual tokenizer at 256 px: SigLIP 2 B/16, one book of 32,768 shared codes; 256, 64 or 16 codes a picture. For a cluster.

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m mmllm.cli tokenizer train tokenizer_256 \\
        --raw /data/pairs --text /data/text.model --out /runs/tokenizer_256/visual

Paths are yours to give, nothing is downloaded: `raw` (shards of `mmllm data convert`), `text` (of `mmllm text-tokenizer train`), and
    --training.model.tower-source and --training.text-tower     open_clip's folder ViT-B-16-SigLIP2-256, tokenizer included
    --training.perceptual-weights                               torchvision's vgg16 state dict

Two stages: `align` trains everything, the tower too, whose teacher is the tower as it was; `decode` freezes the codes, adds the adversary
and perturbs codes. A caption is told from those of one micro-batch on all ranks, 1,024 on 64: on fewer, raise `micro_batch` first.
A semantic table made of rows of the language model that is to read the codes, one for each code, is an option:
    --training.model.quantizer.semantic-table text --training.model.quantizer.phrase-len 1 --training.text-rows /models/Qwen2.5-7B
    --training.model.quantizer.entropy-latents 1024 --training.align.weights.entropy 0.02

Cost, planned, not measured: 1.5 TFLOP a picture in `align` and 1.1 in `decode` (counted on these modules: forward, three times where they
train), 2.0e20 in all; 280 hours of H100 if 200 TFLOP/s are reached, 4.4 hours of 64.
"""

from pathlib import Path

from mmllm.runs.tokenizer_recipe import Gan, Perturb, Stage, Start, TrainTokenizer, TrainVisual
from mmllm.runs.train_teacher import TeacherTraining
from tokenizer.model import TokenizerConfig
from tokenizer.objective import Weights
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import TowerConfig

TOWER = "open_clip:/models/ViT-B-16-SigLIP2-256"

RECIPE = TrainVisual(
    raw=Path("/data/pairs"), text=Path("/data/text.model"), out=Path("/runs/tokenizer_256/visual"),
    training=TrainTokenizer(
        model=TokenizerConfig(
            tower=TowerConfig(image_size=256, patch_size=16), tower_source=TOWER, train_tower=True, projection="mlp", semantic_layers=3,
            pixel="conv", channels=128, multipliers=(1, 1, 2, 2, 4), blocks=2, scales=(1, 2, 4),
            quantizer=QuantizerConfig(codebook_size=32_768, semantic_dim=32, pixel_dims=(8,), semantic_weights=(1.0,), pixel_norm=True,
                                      semantic_table="free")),
        teacher=TeacherTraining(steps=0), text_tower=TOWER, balance_steps=2_000, perceptual="vgg",
        perceptual_weights=Path("/models/vgg16.pth"), start=Start(patches=1_048_576),
        align=Stage(steps=100_000, lr=2e-4, warmup_steps=2_000, min_lr_ratio=0.1, betas=(0.9, 0.95), weight_decay=0.02, clip_grad=1.0,
                    weights=Weights(perceptual=1.0, semantic=1.0, contrastive=1.0)),
        decode=Stage(steps=40_000, lr=1e-4, warmup_steps=2_000, min_lr_ratio=0.1, betas=(0.9, 0.95), weight_decay=0.02, clip_grad=1.0,
                     weights=Weights(perceptual=1.0, quantize=0, semantic=0), gan=Gan(weight=0.4), perturb=Perturb(beta=0.1)),
        batch=1024, micro_batch=16, scale_odds=(0.6, 0.2, 0.2), average=0.9999, precision="bf16", ranks=8, workers=8,
        validate_every=1_000, save_every=2_000, log_every=50, revive_every=100))
