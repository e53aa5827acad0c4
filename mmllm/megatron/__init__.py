"""The decoder and its training on megatron-core, the only room that imports it."""

from mmllm.megatron import (
    cpu as cpu,  # first: without a CUDA device, megatron-core has to be rewritten as it is imported
)
