"""The visual tokenizer at 384 px: SigLIP 2 so400m/16, one book of 65,536; 576, 144 or 64 codes a picture. For a cluster.

    torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m mmllm.cli tokenizer train tokenizer_384 \\
        --raw /data/pairs --text /data/text.model --out /runs/tokenizer_384/visual

Paths to give are those of tokenizer_256, the folder being ViT-SO400M-16-SigLIP2-384. Weights and optimizer are sharded over the ranks.

Cost, planned, not measured: 5.3 TFLOP a picture in `align` and 2.9 in `decode`, counted as for tokenizer_256, 6.6e20 in all; 920 hours of
H100 if 200 TFLOP/s are reached, 7.2 hours of 128.
"""

from dataclasses import replace
from pathlib import Path

from mmllm.runs.tokenizer_recipe import Start
from recipes.tokenizer_256 import RECIPE as BASE
from tokenizer.semantic import TowerConfig

TOWER = "open_clip:/models/ViT-SO400M-16-SigLIP2-384"
_MODEL = BASE.training.model

RECIPE = replace(
    BASE, out=Path("/runs/tokenizer_384/visual"),
    training=replace(
        BASE.training, text_tower=TOWER, start=Start(patches=2_097_152), micro_batch=8, sharded=True,
        align=replace(BASE.training.align, lr=1e-4),
        model=replace(_MODEL, tower=TowerConfig(image_size=384, patch_size=16), tower_source=TOWER, scales=(1, 2, 3),
                      quantizer=replace(_MODEL.quantizer, codebook_size=65_536, pixel_dims=(16,)))))
