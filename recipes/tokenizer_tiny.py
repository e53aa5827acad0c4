"""The visual tokenizer in every part, for a CPU: 32 px scenes, eight books of 256, two stages, no downloads.

    mmllm data scenes --out runs/scenes
    mmllm text-tokenizer train --raw runs/scenes --out runs/scenes/text.model
    mmllm tokenizer train tokenizer_tiny --raw runs/scenes --text runs/scenes/text.model --out runs/tokenizer_tiny/visual

Cost, measured: 97 seconds on one core, a teacher of 400 steps included; 24.8 dB, 51 % of held scenes exact, all codes in use.
results/tokenizer.md says how that was measured; tools/tokenizer_ablation.py varies it. All parts are at work here: the quick start's
closed-form patches rebuild these scenes better.
"""

from pathlib import Path

from mmllm.runs.tokenizer_recipe import Perturb, Stage, Start, TrainTokenizer, TrainVisual
from mmllm.runs.train_teacher import TeacherTraining
from tokenizer.model import TokenizerConfig
from tokenizer.objective import Weights
from tokenizer.quantize import QuantizerConfig

RECIPE = TrainVisual(
    raw=Path("runs/scenes"), text=Path("runs/scenes/text.model"), out=Path("runs/tokenizer_tiny/visual"),
    training=TrainTokenizer(
        model=TokenizerConfig(
            projection="mlp", pixel="vit", width=96, layers=2,
            quantizer=QuantizerConfig(codebook_size=256, semantic_dim=4, pixel_dims=(2,) * 8, semantic_weights=(1.0,), pixel_norm=True,
                                      semantic_table="free")),
        teacher=TeacherTraining(steps=400), start=Start(patches=20_000, rounds=8), batch=16, micro_batch=16,
        align=Stage(steps=1000, lr=2e-3, warmup_steps=50, clip_grad=1.0, weights=Weights(semantic=1.0)),
        decode=Stage(steps=500, lr=1e-3, warmup_steps=20, clip_grad=1.0, weights=Weights(quantize=0, semantic=0),
                     perturb=Perturb(beta=0.5, neighbours=20)),
        validate_every=250, log_every=50))
