"""The verb that puts a model behind OpenAI's interface: `mmllm serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmllm.serve.settings import Settings
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Serve(Settings):
    """Serve a model folder: OpenAI's interface, and a page to chat and draw."""

    model: Path
    """Model folder."""
    device: str | None = None
    """cpu or cuda; a GPU where there is one by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; in bfloat16 a close call may depend on who else asks."""
    int8: bool = False
    """Matrices in a byte a number, for memory."""


def serve(args: Serve) -> None:
    import torch

    try:
        from mmllm.serve.api import main
    except ModuleNotFoundError as error:
        raise ValueError(f"`mmllm serve` needs {error.name}: pip install 'mmllm[serve]'") from error
    main(args.model, args, args.device, getattr(torch, args.dtype), args.int8)


VERBS = {"serve": Verb(Serve, serve, ("model",))}
