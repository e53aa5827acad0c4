"""What decides the rows that a model is trained on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data.mixture import Source, Stage


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which token shards, and how their documents become rows."""

    shards: Path | str = Path()
    """Folder of token shards with its manifest.json, or its URL; the only source where `stages` is empty."""
    prefix: str = "train"
    """Shards whose name starts so."""
    stages: tuple[Stage, ...] = ()
    """Mixtures of several sources, each from a step on."""
    tokenizer: Path | None = None
    """Visual tokenizer: with `text`, shards are raw ones, encoded as they are read. For small runs; otherwise `mmllm data encode`."""
    text: Path | None = None
    """Text tokenizer, a text.model file."""
    row_len: int = 2048
    """s: tokens in a packed row."""
    seed: int = 0
    """Order of documents and every choice a document needs."""
    draw_ratio: float = 0.6
    """Share of picture–text pairs trained text → image; the others are described and asked about."""
    describe_first: float = 0.5
    """Share of described documents whose text comes before the questions; in the others it comes behind them."""
    drop_text: float = 0.1
    """Share of text → image documents whose text is dropped, for guidance."""
    given_weight: float = 0.0
    """Loss weight of what is given: the prompt of a picture that is drawn, the picture that is described."""
    answer_weight: float = 1.0
    """Loss weight of the answers to questions about a picture: a yes or no is one token beside a description's ten."""
    long_documents: Literal["refuse", "drop", "split", "truncate"] = "refuse"
    """A sequence longer than a row ends the run, is left out, cut into several where a part or a turn ends, or loses what is behind the
    first such cut. What cannot be cut is left out. Counted."""
    shuffle_shards: int = 64
    """Shards whose documents are shuffled among each other; a reader has so many open."""
    block_len: int = 4096
    """Documents that are packed together: the borders at which a mixture changes."""
    window: int = 1024
    """Documents looked at to fill the end of a row."""

    @property
    def mixtures(self) -> tuple[Stage, ...]:
        """The stages, or that of the only source."""
        return self.stages or (Stage(sources=(Source(shards=self.shards, prefix=self.prefix),)),)

    def held_out(self, prefix: str) -> "DataConfig":
        """The same sources with the shards of another prefix; of several stages, the last."""
        stages = tuple(replace(stage, from_step=0, sources=tuple(replace(s, prefix=prefix, max_epochs=None) for s in stage.sources))
                       for stage in self.stages[-1:])
        return replace(self, prefix=prefix, stages=stages)
