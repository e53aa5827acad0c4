"""What `mmllm.launch` imports before it forks the ranks of a tuning run: imports paid once for all of them."""

from mmllm.runs.sft import load_deepspeed, train

load_deepspeed()

__all__ = ["train"]
