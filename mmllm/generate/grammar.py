"""What may follow what: text anywhere, and inside `<boi> … <eoi>` one whole picture and nothing else.

    TEXT → <boi> → <grid_HxW> → h·w·M codes, each of its book → <eoi> → TEXT          TEXT → a stop token → DONE

A *state* is a small integer, and for all states but TEXT the ids allowed next are one range. So a batch of rows is two
table look-ups a step, and where every row is inside a picture only that book's rows of the output layer are needed.
The state is a function of the last `<boi>` and what follows it: no history is carried, and a row may be taken up
anywhere. Used by our engine and, as `Processor`, by Hugging Face `generate`.

Letters: b rows, n ids of a row, v ids looked at, S states.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data.vocab import Vocab

TEXT, DONE, GRID, CODE = range(4)  # CODE: the first state that waits for a code of the first grid


@dataclass(frozen=True)
class Grammar:
    """Tables over states; `compile_grammar` builds them."""

    vocab: Vocab
    first: Tensor  # [S] lowest id allowed
    last: Tensor  # [S] one past the highest
    after: Tensor  # [S] the state after an allowed id, where it does not depend on the id
    begin: Tensor  # [grids] state that waits for the first code of a grid
    text: Tensor  # [first_image] which ids TEXT allows
    stop: Tensor  # [stops] ids that end a row

    @property
    def longest(self) -> int:
        """Ids from `<boi>` to `<eoi>` of the largest picture."""
        return 3 + self.vocab.num_books * max(h * w for h, w in self.vocab.grids)

    @cached_property
    def on_host(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """`first`, `last`, `after` and `begin`, so that a step asks the device nothing."""
        return self.first.tolist(), self.last.tolist(), self.after.tolist(), self.begin.tolist()

    def states(self, ids: Tensor) -> Tensor:
        """State of each row after its ids. int64 [b, n] → [b]; padding may come first."""
        b, n = ids.shape
        place = torch.arange(n, device=ids.device)
        boi = torch.where(ids == self.vocab.boi, place, -1).amax(1)  # [b] the last <boi>
        eoi = torch.where(ids == self.vocab.eoi, place, -1).amax(1)
        since = n - 1 - boi  # ids after it
        grid = ids[torch.arange(b, device=ids.device), (boi + 1).clamp(max=n - 1)] - self.vocab.first_grid
        inside = self.begin[grid.clamp(0, len(self.begin) - 1)] + since - 1
        state = torch.where(since == 0, GRID, inside)
        stopped = torch.isin(ids[:, -1], self.stop)
        return torch.where((boi < 0) | (eoi > boi), torch.where(stopped, DONE, TEXT), state)

    def advance(self, state: Tensor, ids: Tensor) -> Tensor:
        """State [b] after one more id [b] each."""
        grid = (ids - self.vocab.first_grid).clamp(0, len(self.begin) - 1)
        following = torch.where(state == GRID, self.begin[grid], self.after[state])
        from_text = torch.where(ids == self.vocab.boi, GRID, torch.where(torch.isin(ids, self.stop), DONE, TEXT))
        return torch.where(state == TEXT, from_text, following)

    def allowed(self, state: Tensor, low: int, high: int, picture: Tensor | None = None) -> Tensor:
        """Which of the ids low … high − 1 may follow. → bool [b, v]. `picture` [b]: whether a picture may begin."""
        ids = torch.arange(low, high, device=state.device)
        allowed = (ids >= self.first[state][:, None]) & (ids < self.last[state][:, None])
        if low < len(self.text):
            width = min(high, len(self.text)) - low
            in_text = state == TEXT
            allowed[:, :width] &= self.text[low:low + width] | ~in_text[:, None]
            if picture is not None and low <= self.vocab.boi < high:
                allowed[:, self.vocab.boi - low] &= picture | ~in_text
        return allowed


def compile_grammar(vocab: Vocab, stop: Collection[int], device: torch.device | str = "cpu") -> Grammar:
    """Tables for a vocabulary. stop: ids that end a row in text (`<eos>`, in chats `<user>` too)."""
    first, last, after = [0, vocab.pad, vocab.first_grid], [vocab.first_image, vocab.pad + 1, vocab.first_image], [TEXT, DONE, CODE]
    begin: list[int] = []
    for h, w in vocab.grids:
        begin.append(len(first))
        for place in range(h * w * vocab.num_books):
            book = vocab.first_image + place % vocab.num_books * vocab.codebook_size
            first.append(book)
            last.append(book + vocab.codebook_size)
            after.append(len(first))
        first.append(vocab.eoi)
        last.append(vocab.eoi + 1)
        after.append(TEXT)
    text = torch.zeros(vocab.first_image, dtype=torch.bool)
    text[:vocab.text_size] = True
    text[[vocab.boi, *stop]] = True

    def table(values: Collection[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    return Grammar(vocab, table(first), table(last), table(after), table(begin), text.to(device), table(stop))


@dataclass(frozen=True)
class Processor:
    """The same rules for Hugging Face: `model.generate(logits_processor=[Processor(grammar, max_length)])`."""

    grammar: Grammar
    max_length: int
    """As given to `generate`: no picture begins that would not end before it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """ids [b, n], scores [b, v] → scores, −inf where not allowed."""
        b, v = scores.shape
        fits = input_ids.shape[1] + self.grammar.longest < self.max_length  # one id stays for the end
        picture = torch.full((b,), fits, device=scores.device)
        return scores.masked_fill(~self.grammar.allowed(self.grammar.states(input_ids), 0, v, picture), -torch.inf)
