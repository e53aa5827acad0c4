"""The quick start's pretraining by itself, on the token shards that a quick start left in runs/quickstart: minutes of two cores.

    mmllm pretrain pretrain_tiny
"""

from dataclasses import replace
from pathlib import Path

from mmllm.runs.quickstart import Quickstart, pretrain_recipe

RECIPE = replace(pretrain_recipe(Quickstart()), out=Path("runs/pretrain_tiny"))
