"""tokenizer_256 with eight books of 4,096: 96 bits a position instead of 15, for a decoder with a head over books. For a cluster.

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m mmllm.cli tokenizer train tokenizer_256_m8 \\
        --raw /data/pairs --text /data/text.model --out /runs/tokenizer_256_m8/visual

Paths to give and cost are those of tokenizer_256.
"""

from dataclasses import replace
from pathlib import Path

from recipes.tokenizer_256 import RECIPE as ONE_BOOK

_MODEL = ONE_BOOK.training.model

RECIPE = replace(
    ONE_BOOK, out=Path("/runs/tokenizer_256_m8/visual"),
    training=replace(ONE_BOOK.training, model=replace(
        _MODEL, quantizer=replace(_MODEL.quantizer, codebook_size=4_096, semantic_dim=8, pixel_dims=(8,) * 8))))
