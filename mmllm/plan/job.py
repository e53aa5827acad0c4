"""What is planned: a recipe's decoder, layout and batch, as far as cost goes, apart from where the recipe came from.

A *job* has the recipe's own `Model`, `Parallel` and `Fp8`, and besides them options that published runs had and ours lacks (overlapped
tensor-parallel collectives, a fused loss), so that the arithmetic can be held against their tables.

Letters: h hidden size, q = heads × head width, k = groups × head width, f MLP width, v vocabulary rows; t tokens of a micro-batch on one
rank, m micro-batches a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmllm.config import Fp8, Model, Parallel


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, as far as its cost goes."""

    model: Model
    parallel: Parallel
    vocab: int
    """v: vocabulary rows, padding included."""
    row_len: int
    """Tokens of a row."""
    global_batch: int
    """Rows a step."""
    micro_batch: int = 1
    """Rows a rank puts through at once."""
    steps: int = 0
    tokens_in_all: int = 0
    """Of the whole run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    fp8: Fp8 = field(default_factory=Fp8)
    zero: Literal[0, 1, 2, 3] = 1
    """Split over data-parallel ranks: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    attended: float | None = None
    """Tokens of the document that a token belongs to, on average over tokens (ΣL² / ΣL); None: the row is one document."""
    trained: float = 1.0
    """Share of tokens whose prediction is trained on: only they reach our output layer."""
    gradient_bytes: int = 4
    """Of one, in the buffer that is reduced."""
    overlapped_tp: bool = False
    """Tensor-parallel collectives are hidden behind the matrix products."""
    overlapped_gather: bool = False
    """Updated weights are gathered behind the next step's forward pass."""
    fused_loss: bool = False
    """Cross-entropy in one kernel over bf16 logits; ours goes through fp32 in chunks."""
    eager: bool = False
    """The model is that of transformers: a kernel an operation, norms in fp32, the logits of a micro-batch at once."""
    lora_rank: int = 0
    """Rank of the only matrices that train; 0 trains all."""
    lora_targets: tuple[str, ...] = ()
    """Matrices of a layer that they are beside, by Hugging Face's names."""
    lora_rows: int = 0
    """Rows of each table of the vocabulary that train with them."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the host's memory: nothing, the optimizer's state, weights too."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch * self.row_len

    @property
    def t(self) -> float:
        return self.micro_batch * self.row_len / self.parallel.cp

    @property
    def m(self) -> float:
        return self.global_batch / (self.parallel.dp * self.micro_batch)

    @property
    def q(self) -> int:
        return self.model.num_attention_heads * self.model.head_width

    @property
    def k(self) -> int:
        return self.model.groups * self.model.head_width

    @property
    def span(self) -> float:
        """Tokens of a document, as attention sees them."""
        return min(self.row_len, self.attended or self.row_len)

    @property
    def between(self) -> int:
        """Ranks that split the tokens between matrices."""
        return self.parallel.tp if self.parallel.sequence_parallel else 1

    @property
    def bytes(self) -> int:
        """Of a value in bf16 or fp32."""
        return 4 if self.precision == "fp32" else 2

    @property
    def copies(self) -> tuple[int, int]:
        """Ranks that hold the same dense weights, and the same experts: optimizer state may be split over them."""
        parallel = self.parallel
        return parallel.dp * parallel.cp, max(1, parallel.ranks // (parallel.pp * parallel.ep * parallel.expert_tp))

    @property
    def stage_layers(self) -> list[int]:
        layers = self.parallel.stage_layers(self.model.num_layers)
        if not layers:
            raise ValueError(f"model.num_layers {self.model.num_layers} cannot be split into {self.parallel.pp} stages: change parallel.pp")
        return layers

    def narrow_layers(self, stage: int) -> int:
        """Layers of a stage whose products are in 8 bits."""
        if self.fp8.scaling == "none":
            return 0
        wide = self.fp8.first_layers_bf16 if stage == 0 else 0
        wide += self.fp8.last_layers_bf16 if stage == self.parallel.pp - 1 else 0
        return max(0, self.stage_layers[stage] - wide)

    def repeated_layers(self, stage: int) -> int:
        """Layers of a stage that are computed again, whole, in the backward pass."""
        layers = self.stage_layers[stage]
        return 0 if self.parallel.recompute != "full" else min(layers, self.parallel.recompute_layers or layers)

    def repeats(self, module: str) -> bool:
        """A part of each layer is computed again."""
        return self.parallel.recompute == "selective" and module in self.parallel.recompute_modules
