"""How likely the model finds a text beside a picture, and a picture beside a text.

A tuned folder is asked as a user asks, one of plain documents reads them as it was trained to. Log-probabilities are of a whole forward
by transformers, not of our own decoder: this is also what others find who open the folder.

Letters: p pairs, b batch, s longest sequence, v ids.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import chat
from data.sequence import TokenSequence, Writer
from mmllm.generate.engine import Engine

BATCH = 64
LOGITS = 2**27
"""Values of logits held at a time, b × s × v: 0.5 GiB in fp32."""

Codes = Sequence[NDArray[np.int32]] | NDArray[np.int32]
"""[M, h, w] of each picture."""


def log_likelihood(engine: Engine, codes: Codes, captions: Sequence[str], pairs: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """pairs of (picture, caption) numbers → log-probabilities [p] in nats: `text` of the caption given the picture, `image` of the
    picture given the caption, and both a token (`text_mean`, `image_mean`)."""
    out: dict[str, Tensor] = {}
    for name, made in (("text", reading), ("image", drawing)):
        sequences = [made(engine, codes[i], captions[j]) for i, j in pairs]
        sums, counts = zip(*(((values * weight).sum(), weight.sum()) for values, weight in
                             zip(log_probabilities(engine, sequences), map(weights, sequences), strict=True)), strict=True)
        out[name], out[name + "_mean"] = torch.stack(sums), torch.stack(sums) / torch.stack(counts)
    return out


def reading(engine: Engine, codes: NDArray[np.int32], text: str) -> TokenSequence:
    """A text after a picture: the weight is on the text and its end."""
    vocab, encode = engine.folder.vocab, engine.folder.text.encode
    if engine.folder.chat:
        asked = [{"type": "image", "codes": codes}, {"type": "text", "text": chat.DESCRIBE_REQUESTS[0]}]
        return chat.conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": text}], vocab, encode)
    out = Writer(vocab)
    out.image(vocab.image_ids(codes), _grid(codes), 0, boi_weight=0)
    out.add(encode(text), 1)
    return out.done()


def drawing(engine: Engine, codes: NDArray[np.int32], text: str) -> TokenSequence:
    """A picture after a text: the weight is on the picture and its end."""
    vocab, encode = engine.folder.vocab, engine.folder.text.encode
    if engine.folder.chat:
        asked, drawn = f"{chat.DRAW_REQUESTS[0]} {text}", [{"type": "image", "codes": codes}]
        return chat.conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": drawn}], vocab, encode)
    out = Writer(vocab)
    out.add(encode(text), 0)
    out.image(vocab.image_ids(codes), _grid(codes), 1, boi_weight=0)
    return out.done()


def _grid(codes: NDArray[np.int32]) -> tuple[int, int]:
    return int(codes.shape[1]), int(codes.shape[2])


def weights(sequence: TokenSequence) -> Tensor:
    """Loss weight of each id but the first. → [s − 1]"""
    return torch.from_numpy(sequence.loss_weight[1:])


@lru_cache(maxsize=1)
def _model(path: Path, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    return model.eval().to(device)


@torch.inference_mode()
def log_probabilities(engine: Engine, sequences: Sequence[TokenSequence]) -> Iterator[Tensor]:
    """Of each id but the first, given those before it: [s − 1] a sequence, in nats, on the CPU. In order."""
    model, vocab = _model(engine.folder.path, engine.decoder.device), engine.folder.vocab
    first = 0
    while first < len(sequences):
        longest, count = 0, 0
        for one in sequences[first:first + BATCH]:
            if count and max(longest, len(one.ids)) * (count + 1) * vocab.size > LOGITS:
                break
            longest, count = max(longest, len(one.ids)), count + 1
        part, first = sequences[first:first + count], first + count
        ids = torch.full((len(part), longest), vocab.pad)
        for row, one in enumerate(part):
            ids[row, :len(one.ids)] = torch.from_numpy(one.ids)
        ids = ids.to(engine.decoder.device)
        logits = model(input_ids=ids).logits[:, :-1].float()  # causal: padding behind changes nothing before it
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()  # [b, s − 1]
        for row, one in zip(chosen, part, strict=True):
            yield row[:len(one.ids) - 1]
