"""The same rules in vLLM: `LLM(FOLDER, logits_processors=["mmllm.generate.vllm_grammar:GrammarProcessor"])`.

Written to the interface that vLLM documents as `vllm.v1.sample.logits_processor` (the V1 model runner): a processor lives as long as the
engine, hears which requests came, went and moved before each step, and changes the logits of all rows at once. A request's output list is
the engine's own and grows by itself. vLLM has no guidance: pictures there are drawn at a guidance of 1.

Letters: b rows, v ids.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.vocab import Vocab
from mmllm.generate.grammar import compile_grammar

if TYPE_CHECKING:
    Base = object
else:
    try:
        from vllm.v1.sample.logits_processor import LogitsProcessor as Base
    except ImportError:
        Base = object


@dataclass
class Row:
    """A request and the state it is in."""

    state: int
    output: list[int]
    """Ids so far; the engine's own list."""
    room: int
    """Ids that it may come to."""
    seen: int = 0
    """Ids that the state has followed."""


class GrammarProcessor(Base):
    """Pictures are whole and legal, whatever is sampled; none begins that the request's limit would cut."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Nothing is asked of a request."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        vocab = Vocab.load(Path(model.model) / "vocab.json")
        self.grammar, self.max_len = compile_grammar(vocab, (vocab.eos, vocab.user), device), int(model.max_model_len)
        self.rows: dict[int, Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Who came, went and moved: in this order, as vLLM asks."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            ids = torch.tensor([list(prompt or [])], dtype=torch.int64, device=self.grammar.first.device)
            room = self.max_len - ids.shape[1]
            room = room if params.max_tokens is None else min(room, params.max_tokens)
            self.rows[index] = Row(int(self.grammar.states(ids)) if ids.numel() else 0, output, room)
        for source, target, direction in batch_update.moved:
            one, other = self.rows.pop(source, None), self.rows.pop(target, None)
            if one is not None:
                self.rows[target] = one
            if other is not None and direction.name == "SWAP":
                self.rows[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """[b, v], −inf where not allowed."""
        grammar, device = self.grammar, logits.device
        while behind := [row for row in self.rows.values() if row.seen < len(row.output)]:
            state = torch.tensor([row.state for row in behind], device=device)
            ids = torch.tensor([row.output[row.seen] for row in behind], device=device)
            for row, after in zip(behind, grammar.advance(state, ids).tolist(), strict=True):
                row.state, row.seen = after, row.seen + 1
        if not self.rows:
            return logits
        index = sorted(self.rows)
        state = torch.tensor([self.rows[i].state for i in index], device=device)
        # one id stays for the end
        fits = torch.tensor([len(self.rows[i].output) + grammar.longest < self.rows[i].room for i in index], device=device)
        allowed = grammar.allowed(state, 0, logits.shape[1], fits)
        logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
        return logits
