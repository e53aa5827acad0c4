"""A model folder that draws, describes and chats.

Everything becomes requests for `mmllm.generate.batching`: rows of different requests go on together, each in its own grammar state, and
text and image ids are sampled each their way. Guidance runs a second row beside each, which inside a picture sees nothing before it, or
a negative prompt. How a prompt is written depends on the folder: plain documents, or turns once tuned.

Letters: p prompts, n pictures a prompt, b pictures, M books, h w code grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import chat
from mmllm import hf
from mmllm.generate.batching import Batch, decode, run
from mmllm.generate.cache import Prefixes
from mmllm.generate.decoder import Decoder, build
from mmllm.generate.grammar import Grammar, compile_grammar
from mmllm.generate.plan import GREEDY, Plan
from mmllm.generate.request import Request
from mmllm.generate.sample import Sampling, request_key
from mmllm.generate.speculate import Speculation, draw_ahead
from tokenizer.model import VisualTokenizer

__all__ = ["GREEDY", "Engine", "Images", "Plan", "decode"]

Images = Tensor | NDArray[np.int32]
"""Pictures [b, 3, H, W] in [-1, 1], or their codes [b, M, h, w] as a numpy array."""


@dataclass(frozen=True)
class Engine:
    """A loaded model folder."""

    folder: hf.Folder
    decoder: Decoder
    batch: int = 256
    """Rows decoded together."""

    @classmethod
    def load(cls, path: Path, device: str | None = None, dtype: torch.dtype = torch.float32, int8: bool = False) -> "Engine":
        """Open a model folder. In bf16 rounding may depend on the batch, and with it a close call in a picture. int8: matrices in a byte a
        number, for memory."""
        folder = hf.open_folder(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(folder, build(folder.config, folder.tensors(), device, dtype, int8))

    @cached_property
    def grammar(self) -> Grammar:
        vocab = self.folder.vocab
        return compile_grammar(vocab, (vocab.eos, vocab.user), self.decoder.device)

    @cached_property
    def visual(self) -> VisualTokenizer:
        return VisualTokenizer.load(self.folder.visual_tokenizer)

    @cached_property
    def prefixes(self) -> Prefixes:
        """Conversations that may go on."""
        return Prefixes()

    # Requests ---------------------------------------------------------------------------------------------------------

    def draw_requests(self, words: str, n: int = 1, plan: Plan | None = None, seed: int = 0,
                      grid: tuple[int, int] | None = None) -> list[Request]:
        """n pictures of one prompt; `picture_of` reads the ids of each. A picture depends on prompt, plan, seed and its number below n."""
        vocab = self.folder.vocab
        frame = [vocab.boi, vocab.grid(*(grid or vocab.grids[0]))]
        row = [*self._asked(words), *frame]
        plan = plan or Plan(only_picture=True)
        return [Request(prompt=row, key=request_key(seed, number, row), plan=plan, blank=self._blank(plan)) for number in range(n)]

    def chat_request(self, turns: Sequence[chat.Turn], plan: Plan | None = None, seed: int = 0) -> Request:
        """The assistant's turn after these. Errors: ValueError for a folder that does not chat, or a conversation that is too long."""
        if not self.folder.chat:
            raise ValueError(f"{self.folder.path} was not tuned on conversations: run `mmllm sft` first, "
                             "or use `mmllm generate` and `mmllm describe`")
        prompt = chat.prompt(turns, self.folder.vocab, self.folder.text.encode)
        plan = plan or Plan(max_text=256, max_pictures=1)
        most = plan.most(self.grammar.longest)
        if len(prompt) + most > self.folder.max_len:
            raise ValueError(f"the conversation has {len(prompt):,} tokens and the reply may add {most:,}, "
                             f"but the model reads {self.folder.max_len:,}: start a new one")
        return Request(prompt=prompt, key=request_key(seed, 0, prompt), plan=plan, blank=self._blank(plan))

    def batching(self, rows: int = 32, columns: int | None = None) -> Batch:
        """A continuous batch of this model, for a server. columns: tokens a request may come to, prompt included; what the model
        reads, if not given."""
        return Batch(self.decoder, self.grammar, rows, columns or self.folder.max_len, self.prefixes)

    def picture_of(self, request: Request, ids: Sequence[int]) -> NDArray[np.int32]:
        """Codes [M, h, w] of a request for a picture that got these ids."""
        vocab = self.folder.vocab
        h, w = vocab.grids[request.prompt[-1] - vocab.first_grid]
        return vocab.codes(ids, h, w)

    def parts_of(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """What an assistant said, as parts: stretches of text, and pictures as codes."""
        return _parts(self._said(list(ids)), self)

    # At once ----------------------------------------------------------------------------------------------------------

    def draw(self, prompts: Sequence[str], n: int = 1, guidance: float = 1.0, sampling: Sampling | None = None, seed: int = 0,
             grid: tuple[int, int] | None = None, negative: str = "", ahead: Speculation | None = None) -> NDArray[np.int32]:
        """Pictures for prompts. → codes [p, n, M, h, w]; `pictures` paints them.

        A picture depends on prompt, seed and its number below n; not on what else is drawn. negative: what guidance leads away from.
        ahead: decode several codes in a pass; other pictures for a seed, of one distribution."""
        plan = Plan(image=sampling or Sampling(), guidance=guidance, negative=negative, only_picture=True)
        requests = [request for words in prompts for request in self.draw_requests(words, n, plan, seed, grid)]
        codes = [self.picture_of(request, ids) for request, ids in zip(requests, self.decode(requests, ahead), strict=True)]
        grid = grid or self.folder.vocab.grids[0]
        return np.array(codes, np.int32).reshape(len(prompts), n, self.folder.vocab.num_books, *grid)

    def describe(self, images: Images | Sequence[NDArray[np.int32]], question: str | Sequence[str] | None = None,
                 sampling: Sampling = GREEDY, seed: int = 0, max_text: int = 64) -> list[str]:
        """Describe each picture, or answer the question (one for all, or one each). → texts [b]. Codes may be of several sizes.

        A folder of plain documents was trained on questions after a description, so it describes first."""
        vocab, encode = self.folder.vocab, self.folder.text.encode
        shown = [chat.image(vocab.image_ids(codes).tolist(), (codes.shape[1], codes.shape[2]), vocab)
                 for codes in (self.codes(images) if isinstance(images, Tensor) else images)]
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
                rows = [[*row, *self._said(text), vocab.user, *encode(words or ""), vocab.assistant]
                        for row, text, words in zip(rows, self._decode(rows, seed, plan), questions, strict=True)]
        return [self.folder.text.decode(self._said(ids)) for ids in self._decode(rows, seed, plan)]

    def chat(self, turns: Sequence[chat.Turn], plan: Plan | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """The content of the assistant's turn after these: parts of text and pictures as in `data.chat`. Earlier turns are not read again
        where they are remembered."""
        return self.parts_of(run(self.decoder, self.grammar, [self.chat_request(turns, plan, seed)], prefixes=self.prefixes)[0])

    def decode(self, requests: Sequence[Request], ahead: Speculation | None = None,
               told: Callable[[int], None] = lambda done: None) -> list[list[int]]:
        """New ids of each request, at most `batch` together. ahead: for pictures alone."""
        if ahead is None:
            return run(self.decoder, self.grammar, requests, self.batch * (1 + any(one.plan.guided for one in requests)), told=told)
        groups = ahead.groups_of(self.visual) if ahead.delta > 0 else None
        ids = list[list[int]]()
        for first in range(0, len(requests), self.batch):
            ids += draw_ahead(self.decoder, self.grammar, requests[first:first + self.batch], ahead, groups).ids
            told(len(ids))
        return ids

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

    def _decode(self, rows: list[list[int]], seed: int, plan: Plan) -> list[list[int]]:
        return self.decode([Request(prompt=row, key=request_key(seed, 0, row), plan=plan) for row in rows])

    def _asked(self, words: str) -> list[int]:
        """Ids that ask for a picture, up to where it begins."""
        vocab, encode = self.folder.vocab, self.folder.text.encode
        if not self.folder.chat:
            return [vocab.bos, *encode(words)]
        asked = words if words.startswith(chat.DRAW_REQUESTS) else f"{chat.DRAW_REQUESTS[0]} {words}"
        return chat.prompt([{"role": "user", "content": asked}], vocab, encode)

    def _blank(self, plan: Plan) -> list[int]:
        return self._asked(plan.negative) if plan.guided and plan.negative else []


def _parts(ids: list[int], engine: Engine) -> list[dict[str, Any]]:
    """What an assistant said, as parts: stretches of text, and pictures as codes."""
    vocab, parts = engine.folder.vocab, list[dict[str, Any]]()
    while ids:
        if ids[0] == vocab.boi:
            end = ids.index(vocab.eoi)
            h, w = vocab.grids[ids[1] - vocab.first_grid]
            parts.append({"type": "image", "codes": vocab.codes(ids[2:end], h, w)})
            ids = ids[end + 1:]
        else:
            end = ids.index(vocab.boi) if vocab.boi in ids else len(ids)
            parts.append({"type": "text", "text": engine.folder.text.decode(ids[:end])})
            ids = ids[end:]
    return parts
