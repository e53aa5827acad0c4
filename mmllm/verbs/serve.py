"""The verb that puts a model behind OpenAI's interface: `mmllm serve`."""

from dataclasses import dataclass, fields
from pathlib import Path

from mmllm.serve.settings import Settings
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Serve(Settings):
    """Serve a model folder: OpenAI's interface, and a page to chat and draw."""

    model: Path
    """Model folder."""
    device: str | None = None
    """cpu or cuda; a GPU where there is one by default."""


def serve(args: Serve) -> None:
    try:
        from mmllm.serve.api import main
    except ModuleNotFoundError as error:
        raise ValueError(f"`mmllm serve` needs {error.name}: pip install 'mmllm[serve]'") from error
    main(args.model, Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)}), args.device)


VERBS = {"serve": Verb(Serve, serve, ("model",))}
