"""Continuous batching: requests join and leave between steps, and each gets what it would get alone.

A *request* is a prompt with its plan and its key; its random numbers belong to the key (`mmllm.generate.sample`), its logits to its rows
of the cache, so nothing depends on who stands beside it. A step samples one id for every request that runs, lets those that are done go,
and reads the ids. Guidance gives a request a second row, which waits behind its own beginning until a picture begins.

Rows of one range of ids and one way of sampling go through the output head together, over that range alone.

Letters: b rows, v ids looked at, M books, w columns of the code grid.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmllm.generate.cache import Prefixes
from mmllm.generate.decoder import Decoder
from mmllm.generate.grammar import DONE, TEXT, Grammar
from mmllm.generate.plan import Plan
from mmllm.generate.request import Event, Request, Running
from mmllm.generate.sample import Sampling, sample, uniforms

PREFILL = 8192
"""Prompt tokens that join in one step, so that nobody waits long for others' prompts; a longer one joins alone."""
AHEAD = 512
"""Text tokens that room is planned for; a longer text makes the cache grow."""
IDLE_BYTES = 64 << 20
"""Keys and values that are held while there is nothing to do."""


class Batch:
    """The rows of a decoder, and who waits for one."""

    def __init__(self, decoder: Decoder, grammar: Grammar, rows: int, columns: int, prefixes: Prefixes | None = None,
                 patience: int = 1) -> None:
        """rows: at most, a guided request takes two. columns: tokens a row may come to, prompt and picture included.
        prefixes: where beginnings of prompts are remembered. patience: rows that must be free before some join: many at once are read
        faster, one at a time waits less.

        The cache is as large as those need who join: pictures whole, and text up to `AHEAD`; it grows for a longer one. Once nobody is
        left, one above `IDLE_BYTES` is given back."""
        self.decoder, self.grammar, self.prefixes = decoder, grammar, prefixes
        self.most_rows, self.columns, self.patience = rows, columns, min(patience, rows)
        self.cache = decoder.room(0, 0)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.rows: list[tuple[Running, bool]] = []  # by row of the cache: whose it is, and whether it is the blank one
        self.hidden = torch.empty(0, device=decoder.device)  # [rows in use, d]
        self.tickets = self.passes = self.read = 0  # read: tokens of prompts that were not known
        no_picture = grammar.text.clone()
        no_picture[grammar.vocab.boi] = False
        self.forbidden = ~torch.stack([no_picture, grammar.text])  # [2, first_image]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return self.most_rows - len(self.rows)

    def submit(self, request: Request) -> int:
        """Queue a request. → its ticket. Errors: ValueError for one that could never run."""
        plan, most = request.plan, request.plan.most(self.grammar.longest)
        state = self.grammar.states(torch.tensor([list(request.prompt)], device=self.grammar.first.device)) if request.prompt else TEXT
        state = int(state)
        blank = (len(request.blank) or 1) + (self._picture(request.prompt) if state > DONE else 0)
        need = max(len(request.prompt), blank * plan.guided) + most
        if not request.prompt or need > self.columns:
            raise ValueError(f"the prompt has {len(request.prompt):,} tokens and {most:,} more may come, but a row holds "
                             f"{self.columns:,}: shorten it, or lower max_text or max_pictures")
        if 1 + plan.guided > self.most_rows:
            raise ValueError(f"guidance needs two rows, the batch has {self.most_rows}")
        if not most:
            raise ValueError("max_text and max_pictures are 0: there is nothing to add")
        if plan.only_picture and state <= DONE:
            raise ValueError("only_picture asks for a prompt that ends inside a picture")
        self.tickets += 1
        need -= max(0, plan.max_text * (not plan.only_picture) - AHEAD)
        self.waiting.append(Running(self.tickets, request, state, need, uniforms([request.key], most)[0].numpy(),
                                    time.monotonic() + plan.max_s))
        return self.tickets

    def cancel(self, ticket: int) -> None:
        """It says nothing more, and its rows are free with the next step."""
        for one in (*self.waiting, *self.running):
            if one.ticket == ticket:
                one.reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One id for everybody who runs."""
        if any(one.reason for one in self.waiting):
            self.waiting = deque(one for one in self.waiting if not one.reason)
        cancelled = [one for one in self.running if one.reason]
        if cancelled:
            self.hidden = self.hidden[self._leave(cancelled)]
        self._join()
        self._sample()
        events = [Event(one.ticket, one.new[-1], bool(one.reason), one.reason) for one in self.running]
        left = [one for one in self.running if one.reason]
        if left:
            self._leave(left)
        if self.running:
            self._room(len(self.rows), 1 + int(self.cache.length[:len(self.rows)].max()))
            ids = torch.tensor([one.new[-1:] for one, _ in self.rows], device=self.decoder.device)
            self.hidden = self.decoder.read(ids, self.cache)
            self.passes += 1
            for one in self.running:
                if one.blank >= 0 and one.state == TEXT:  # it has seen nothing
                    self.cache.length[one.blank] = one.blank_len
        elif self.idle and self.cache.nbytes > IDLE_BYTES:
            self.cache = self.decoder.room(0, 0)
        return events

    # Joining and leaving ----------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Who waits longest joins first, while there are rows. A prompt that several have is read once."""
        if not self.waiting or (self.running and self.free < self.patience):
            return
        new, tokens = list[Running](), 0
        while self.waiting and 1 + self.waiting[0].request.plan.guided <= self.free - len(new) - sum(x.request.plan.guided for x in new):
            tokens += len(self.waiting[0].request.prompt)
            if new and tokens > PREFILL:
                break
            new.append(self.waiting.popleft())
        if not new:
            return
        self._room(len(self.rows) + len(new) + sum(one.request.plan.guided for one in new), max(one.need for one in new))
        wanted: dict[tuple[int, ...], list[tuple[Running, bool]]] = {}
        for one in new:
            prompt = one.request.prompt
            wanted.setdefault(tuple(prompt), []).append((one, False))
            if one.request.plan.guided:
                start = list(one.request.blank) or [self.grammar.vocab.bos]
                one.blank_len = len(start)
                inside = prompt[len(prompt) - self._picture(prompt):] if one.in_picture else ()
                wanted.setdefault((*start, *inside), []).append((one, True))
        first = len(self.rows)
        leaders = [users[0] for users in wanted.values()]
        followers = [(user, number) for number, users in enumerate(wanted.values()) for user in users[1:]]
        hidden = self._read(list(wanted), first)
        self.cache.copy([first + number for _, number in followers],
                        list(range(first + len(leaders), first + len(leaders) + len(followers))))
        hidden = torch.cat([hidden, hidden[[number for _, number in followers]]])
        self.hidden = torch.cat([self.hidden, hidden]) if self.rows else hidden
        self._place([*self.rows, *leaders, *(user for user, _ in followers)])
        self.running += new

    def _room(self, rows: int, columns: int) -> None:
        """A cache of that size at least. The first is exact; one that grows does so by half, so that it costs little."""
        now = self.cache
        if rows > now.rows or columns > now.columns:
            rows = now.rows if rows <= now.rows else min(self.most_rows, max(rows, now.rows * 3 // 2))
            columns = now.columns if columns <= now.columns else min(self.columns, max(columns, now.columns * 3 // 2))
            self.cache = now.move_to(self.decoder.room(rows, columns))

    def _read(self, prompts: list[tuple[int, ...]], row: int) -> Tensor:
        """Prompts into the rows from `row` on. → hidden state of each last token [b, d]"""
        self.cache.length[row:row + len(prompts)] = 0
        known = [self.prefixes.fill(prompt, self.cache, row + i) if self.prefixes else 0 for i, prompt in enumerate(prompts)]
        self.read += sum(map(len, prompts)) - sum(known)
        if not any(known):
            return self.decoder.prefill(prompts, self.cache, row)
        return torch.cat([self.decoder.prefill([prompt[count:]], self.cache, row + i)
                          for i, (prompt, count) in enumerate(zip(prompts, known, strict=True))])

    def _picture(self, prompt: Sequence[int]) -> int:
        """Ids from the last `<boi>` on."""
        return list(reversed(prompt)).index(self.grammar.vocab.boi) + 1

    def _place(self, rows: list[tuple[Running, bool]]) -> None:
        self.rows = rows
        for row, (one, blank) in enumerate(rows):
            if blank:
                one.blank = row
            else:
                one.row = row

    def _leave(self, left: list[Running]) -> list[int]:
        """Their rows are taken by the last ones. → where each row was"""
        if self.prefixes is not None:
            for one in (one for one in left if not one.request.plan.only_picture):  # what may go on
                ids = [*one.request.prompt, *one.new]
                self.prefixes.keep(ids[:int(self.cache.length[one.row])], self.cache, one.row)
        gone = {one.ticket for one in left}
        self.running = [one for one in self.running if one.ticket not in gone]
        count = sum(one.ticket not in gone for one, _ in self.rows)
        holes = [row for row in range(count) if self.rows[row][0].ticket in gone]
        movers = [row for row in range(count, len(self.rows)) if self.rows[row][0].ticket not in gone]
        self.cache.copy(movers, holes)
        rows = self.rows[:count]
        for hole, mover in zip(holes, movers, strict=True):
            rows[hole] = self.rows[mover]
        self._place(rows)
        return [movers[holes.index(row)] if row in holes else row for row in range(count)]

    # Sampling ---------------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        """The next id of every row that goes on."""
        first, last, _, _ = self.grammar.on_host
        groups: dict[tuple[int, int, Sampling, float], list[Running]] = {}
        for one in self.running:
            plan, inside = one.request.plan, one.in_picture
            groups.setdefault((first[one.state], last[one.state], plan.image if inside else plan.text,
                               plan.guidance if inside and one.blank >= 0 else 1.0), []).append(one)
        for (low, high, how, guidance), members in groups.items():
            if high - low == 1:
                ids = [low] * len(members)
            else:
                asked = [one.row for one in members] + [one.blank for one in members if guidance != 1.0]
                logits = self.decoder.logits(self._of(asked), low, high)
                if guidance != 1.0:
                    logits, blank = logits.chunk(2)
                    logits = blank + guidance * (logits - blank)
                if members[0].state == TEXT:
                    logits = logits.masked_fill(self.forbidden[[int(one.begins) for one in members]], -torch.inf)
                u = torch.tensor(np.array([one.random[len(one.new)] for one in members]), device=logits.device)
                ids = (low + sample(logits, u, how)).tolist()
            for one, token in zip(members, ids, strict=True):
                one.advance(token, self.grammar)

    def _of(self, rows: list[int]) -> Tensor:
        return self.hidden if len(rows) == len(self.hidden) and rows == list(range(len(rows))) else self.hidden[rows]


def decode(decoder: Decoder, grammar: Grammar, prompts: Sequence[Sequence[int]], keys: Sequence[int], plan: Plan) -> list[list[int]]:
    """Continue prompts, each until a stop token or a spent budget. keys: of each request's random numbers.

    → new ids of each row; the stop token is the last where there was one."""
    return run(decoder, grammar, [Request(prompt=prompt, key=key, plan=plan) for prompt, key in zip(prompts, keys, strict=True)])


def run(decoder: Decoder, grammar: Grammar, requests: Sequence[Request], rows: int = 1024, prefixes: Prefixes | None = None,
        told: Callable[[int], None] = lambda done: None) -> list[list[int]]:
    """All requests, in at most so many rows of the cache at a time. → new ids of each. told: how many are done, as they get done."""
    if not requests:
        return []
    need = sum(1 + request.plan.guided for request in requests)
    columns = max(max(len(one.prompt), len(one.blank) + grammar.longest) + one.plan.most(grammar.longest) for one in requests)
    rows = max(2, min(rows, need))
    batch = Batch(decoder, grammar, rows, columns, prefixes=prefixes, patience=-(-rows // 4))
    number = {batch.submit(requests[i]): i for i in sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))}
    ids: list[list[int]] = [[] for _ in requests]
    done = 0
    while not batch.idle:
        events = batch.step()
        for event in events:
            ids[number[event.ticket]].append(event.id)
        if ended := sum(event.last for event in events):
            done += ended
            told(done)
    return ids
