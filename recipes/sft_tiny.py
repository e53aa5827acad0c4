"""The quick start's instruction tuning by itself, on conversations made from the scenes of runs/quickstart: a minute of two cores.

    mmllm sft sft_tiny
"""

from dataclasses import replace
from pathlib import Path

from mmllm.runs.quickstart import Quickstart, sft_recipe

RECIPE = replace(sft_recipe(Quickstart()), out=Path("runs/sft_tiny"))
