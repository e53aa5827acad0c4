"""A model folder that draws, describes and chats.

`decode` is one loop for everything: rows of different requests go on together, each in its own grammar state, and text
and image ids are sampled each their way. Guidance runs a second row beside each, which inside a picture sees nothing
before it, in the same forward. How a prompt is written depends on the folder: plain documents, or turns once tuned.

Letters: b rows, p prompts, n pictures a prompt, M books, h w code grid, v ids looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import chat
from mmllm import hf
from mmllm.generate.decoder import Decoder, build
from mmllm.generate.grammar import CODE, DONE, GRID, TEXT, Grammar, compile_grammar
from mmllm.generate.sample import Sampling, request_key, sample, uniforms
from tokenizer.model import VisualTokenizer

Images = Tensor | NDArray[np.int32]
"""Pictures [b, 3, H, W] in [-1, 1], or their codes [b, M, h, w] as a numpy array."""

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rows are continued."""

    text: Sampling = GREEDY
    """Sampling of text."""
    image: Sampling = field(default_factory=Sampling)
    """Sampling of image codes."""
    guidance: float = 1.0
    """Image logits are blank + guidance × (seen − blank), where blank sees no text; 1 needs no second row."""
    max_text: int = 64
    """Text tokens a row may add. Pictures do not count, and none is cut."""
    max_pictures: int = 0
    """Pictures a row may begin."""
    only_picture: bool = False
    """The prompt ends inside a picture; stop with its last code."""


@torch.inference_mode()
def decode(decoder: Decoder, grammar: Grammar, prompts: list[list[int]], keys: Sequence[int],
           plan: Plan) -> list[list[int]]:
    """Continue prompts, each until a stop token or a spent budget. keys: of each request's random numbers.

    → new ids of each row; the stop token is the last where there was one."""
    device, vocab = decoder.device, grammar.vocab
    new: list[list[int]] = [[] for _ in prompts]
    state = torch.cat([grammar.states(torch.tensor([row], device=device)) for row in prompts])
    limit = grammar.longest * (plan.max_pictures + plan.only_picture) + (0 if plan.only_picture else plan.max_text)
    random = uniforms(keys, limit).to(device)
    request = torch.arange(len(prompts), device=device)  # which prompt a running row continues
    written, pictures = torch.zeros_like(request), torch.zeros_like(request)
    guided = plan.guidance != 1.0 and (plan.only_picture or plan.max_pictures > 0)
    starts = prompts
    if guided:
        starts = prompts + [[vocab.bos, *row[len(row) - 1 - row[::-1].index(vocab.boi):]] if inside else row
                            for row, inside in zip(prompts, (state > DONE).tolist(), strict=True)]
    hidden, cache = decoder.start(starts, min(limit, 64))
    for step in range(limit):
        low, high = grammar.span(state)
        if high - low == 1:
            ids = torch.full_like(state, low)
        else:
            logits = decoder.logits(hidden, low, high)
            if guided:
                seen, blank = logits.chunk(2)
                logits = torch.where((state > DONE)[:, None], blank + plan.guidance * (seen - blank), seen)
            if bool((state < CODE).any()) or not _one_range(grammar, state):
                allowed = grammar.allowed(state, low, high, pictures < plan.max_pictures)
                logits = logits.masked_fill(~allowed, -torch.inf)
            ids = low + _sample_each(logits, random[request, step], state > DONE, plan)
        before, state = state, grammar.advance(state, ids)
        for row, token, running in zip(request.tolist(), ids.tolist(), (before != DONE).tolist(), strict=True):
            if running:
                new[row].append(token)
        written += before == TEXT
        begins = (state == GRID) & (before == TEXT)
        pictures += begins
        over = grammar.first[state] == vocab.eoi if plan.only_picture else (state == TEXT) & (written >= plan.max_text)
        state = torch.where(over, DONE, state)
        going = state != DONE
        left = int(going.sum())
        if not left:
            break
        if left <= 0.75 * len(state):  # finished rows leave; copying the cache costs about a step
            request, state, ids, written, pictures, begins = (
                x[going] for x in (request, state, ids, written, pictures, begins))
            cache.keep(torch.cat([going, going]) if guided else going)
        if guided and bool(begins.any()):
            cache.forget(torch.cat([torch.zeros_like(begins), begins]))
        cache.room(1)
        hidden = decoder.read((torch.cat([ids, ids]) if guided else ids)[:, None], cache)
    return new


def _one_range(grammar: Grammar, state: Tensor) -> bool:
    """All rows may continue with the same range of ids."""
    first = grammar.first[state]
    return bool((first == first[0]).all())


def _sample_each(logits: Tensor, random: Tensor, in_picture: Tensor, plan: Plan) -> Tensor:
    """Each row by the sampling of its modality: logits [b, v] → [b]."""
    count = int(in_picture.sum())
    if count in (0, len(logits)) or plan.text == plan.image:
        return sample(logits, random, plan.image if count else plan.text)
    return torch.where(in_picture, sample(logits, random, plan.image), sample(logits, random, plan.text))


@dataclass(frozen=True)
class Engine:
    """A loaded model folder."""

    folder: hf.Folder
    decoder: Decoder
    batch: int = 256
    """Rows decoded together."""

    @classmethod
    def load(cls, path: Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> "Engine":
        """Open a model folder. In bf16 rounding may depend on the batch, and with it a close call in a picture."""
        folder = hf.open_folder(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(folder, build(folder.config, folder.tensors(), device, dtype))

    @cached_property
    def grammar(self) -> Grammar:
        vocab = self.folder.vocab
        return compile_grammar(vocab, (vocab.eos, vocab.user), self.decoder.device)

    @cached_property
    def visual(self) -> VisualTokenizer:
        return VisualTokenizer.load(self.folder.visual_tokenizer)

    def draw(self, prompts: Sequence[str], n: int = 1, guidance: float = 1.0, sampling: Sampling | None = None,
             seed: int = 0, grid: tuple[int, int] | None = None) -> NDArray[np.int32]:
        """Pictures for prompts. → codes [p, n, M, h, w]; `pictures` paints them.

        A picture depends on prompt, seed and its number below n; not on what else is drawn."""
        vocab, encode = self.folder.vocab, self.folder.text.encode
        grid = grid or vocab.grids[0]
        frame = [vocab.boi, vocab.grid(*grid)]
        rows, keys = list[list[int]](), list[int]()
        for words in prompts:
            if self.folder.chat:
                asked = words if words.startswith(chat.DRAW_REQUESTS) else f"{chat.DRAW_REQUESTS[0]} {words}"
                row = chat.prompt([{"role": "user", "content": asked}], vocab, encode) + frame
            else:
                row = [vocab.bos, *encode(words), *frame]
            rows += [row] * n
            keys += [request_key(seed, number, row) for number in range(n)]
        plan = Plan(image=sampling or Sampling(), guidance=guidance, only_picture=True)
        codes = [vocab.codes(ids, *grid) for ids in self._decode(rows, keys, plan)]
        return np.array(codes, np.int32).reshape(len(prompts), n, vocab.num_books, *grid)

    def describe(self, images: Images, question: str | Sequence[str] | None = None, sampling: Sampling = GREEDY,
                 seed: int = 0, max_text: int = 64) -> list[str]:
        """Describe each picture, or answer the question (one for all, or one each). → texts [b].

        A folder of plain documents was trained on questions after a description, so it describes first."""
        vocab, encode = self.folder.vocab, self.folder.text.encode
        shown = [chat.image(vocab.image_ids(codes).tolist(), (codes.shape[1], codes.shape[2]), vocab)
                 for codes in self.codes(images)]
        questions = [question] * len(shown) if question is None or isinstance(question, str) else list(question)
        if len(questions) != len(shown):
            raise ValueError(f"{len(questions)} questions for {len(shown)} pictures: give one for all, or one each")
        plan = Plan(text=sampling, max_text=max_text)
        if self.folder.chat:
            asked = [chat.DESCRIBE_REQUESTS[0] if words is None else words for words in questions]
            rows = [[vocab.bos, vocab.user, *image, *encode(words), vocab.assistant]
                    for image, words in zip(shown, asked, strict=True)]
        else:
            rows = [[vocab.bos, *image] for image in shown]
            if question is not None:
                descriptions = self._decode(rows, [request_key(seed, 0, row) for row in rows], plan)
                rows = [[*row, *self._said(text), vocab.user, *encode(words or ""), vocab.assistant]
                        for row, text, words in zip(rows, descriptions, questions, strict=True)]
        ids = self._decode(rows, [request_key(seed, 0, row) for row in rows], plan)
        return [self.folder.text.decode(self._said(row)) for row in ids]

    def chat(self, turns: Sequence[chat.Turn], plan: Plan | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """The content of the assistant's turn after these: parts of text and pictures as in `data.chat`."""
        if not self.folder.chat:
            raise ValueError(f"{self.folder.path} was not tuned on conversations: run `mmllm sft` first, "
                             "or use `mmllm generate` and `mmllm describe`")
        vocab = self.folder.vocab
        prompt = chat.prompt(turns, vocab, self.folder.text.encode)
        plan = plan or Plan(max_text=256, max_pictures=1)
        most = plan.max_text + plan.max_pictures * self.grammar.longest
        if len(prompt) + most > self.folder.max_len:
            raise ValueError(f"the conversation has {len(prompt):,} tokens and the reply may add {most:,}, "
                             f"but the model reads {self.folder.max_len:,}: start a new one")
        key = request_key(seed, 0, prompt)
        ids = self._said(self._decode([prompt], [key], plan)[0])
        return _parts(ids, self)

    def codes(self, images: Images) -> NDArray[np.int32]:
        """Pictures → codes [b, M, h, w]; codes stay."""
        return images if isinstance(images, np.ndarray) else self.visual.encode(images).cpu().numpy()

    def pictures(self, codes: NDArray[np.int32]) -> Tensor:
        """Codes [..., M, h, w] → pictures [..., 3, H, W]."""
        flat = torch.from_numpy(codes.reshape(-1, *codes.shape[-3:]))
        images = torch.cat([self.visual.decode(part) for part in flat.split(self.batch)])
        return images.reshape(*codes.shape[:-3], *images.shape[1:])

    def _said(self, ids: list[int]) -> list[int]:
        """Without the token that ended it."""
        return ids[:-1] if ids and ids[-1] in (self.folder.vocab.eos, self.folder.vocab.user) else ids

    def _decode(self, rows: list[list[int]], keys: list[int], plan: Plan) -> list[list[int]]:
        """In batches of rows of about one length, so that little is padding."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        done: dict[int, list[int]] = {}
        for first in range(0, len(rows), self.batch):
            part = order[first:first + self.batch]
            ids = decode(self.decoder, self.grammar, [rows[i] for i in part], [keys[i] for i in part], plan)
            done.update(zip(part, ids, strict=True))
        return [done[i] for i in range(len(rows))]


def _parts(ids: list[int], engine: Engine) -> list[dict[str, Any]]:
    """What an assistant said, as parts: stretches of text, and pictures as codes."""
    vocab, parts = engine.folder.vocab, list[dict[str, Any]]()
    while ids:
        if ids[0] == vocab.boi:
            end = ids.index(vocab.eoi)
            h, w = vocab.grids[ids[1] - vocab.first_image + len(vocab.grids)]
            parts.append({"type": "image", "codes": vocab.codes(ids[2:end], h, w)})
            ids = ids[end + 1:]
        else:
            end = ids.index(vocab.boi) if vocab.boi in ids else len(ids)
            parts.append({"type": "text", "text": engine.folder.text.decode(ids[:end])})
            ids = ids[end:]
    return parts
