"""sft_8b with low-rank adapters on every matrix of the layers, the base's weights as they are. For one node of H100.

    mmllm plan sft_8b_lora --decoder continue_qwen3_8b --write launch && sbatch launch/slurm.sh

All matrices, alpha twice the rank and ten times the rate of full tuning, as Biderman et al. 2024, arXiv:2405.09673, advise. Rows of
pictures are not trained: the base has learned them. Weights are whole on each rank; their merger with the adapters is `hf`.

Planned, not measured: 76 GPU hours, 0.4 days.
"""

from dataclasses import replace
from pathlib import Path

from mmllm.runs.sft_recipe import Lora
from recipes.sft_8b import RECIPE as FULL

RECIPE = replace(FULL, out=Path("/data/runs/sft_8b_lora"), lora=Lora(rank=64, alpha=128.0, rows="none"), lr=1e-4, ranks=8, zero_stage=2)
