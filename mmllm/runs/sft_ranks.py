"""What `mmllm.launch` imports before it forks the ranks of a tuning run: imports paid once for all of them."""

from mmllm.runs.sft import train
from mmllm.runs.sft_engine import load_deepspeed

load_deepspeed()

__all__ = ["train"]
