"""How likely the model finds a text beside a picture, and a picture beside a text: log-probabilities of the tuned model's replies.

Letters: p pairs, b batch, s longest sequence.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import chat
from data.sequence import TokenSequence
from mmllm.generate.engine import Engine

BATCH = 64


def log_likelihood(engine: Engine, codes: NDArray[np.int32], captions: Sequence[str],
                   pairs: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """pairs of (picture, caption) numbers → log-probabilities [p] in nats: `text` of the caption given the picture, `image` of the
    picture given the caption, and both a token (`text_mean`, `image_mean`)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    vocab, encode = engine.folder.vocab, engine.folder.text.encode
    model = AutoModelForCausalLM.from_pretrained(engine.folder.path).eval()

    def turns(asked: Any, replied: Any) -> TokenSequence:
        return chat.conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": replied}], vocab, encode)

    def picture(number: int) -> dict[str, Any]:
        return {"type": "image", "codes": codes[number]}

    seen = [turns([picture(i), {"type": "text", "text": chat.DESCRIBE_REQUESTS[0]}], captions[j]) for i, j in pairs]
    drawn = [turns(f"{chat.DRAW_REQUESTS[0]} {captions[j]}", [picture(i)]) for i, j in pairs]
    out: dict[str, Tensor] = {}
    for name, sequences in (("text", seen), ("image", drawn)):
        sums, counts = _score(model, sequences, vocab.pad)
        out[name], out[name + "_mean"] = sums, sums / counts
    return out


@torch.inference_mode()
def _score(model: Any, sequences: Sequence[TokenSequence], pad: int) -> tuple[Tensor, Tensor]:
    """→ weighted log-probability of each sequence [p], and its weight [p]."""
    sums, counts = list[Tensor](), list[Tensor]()
    for first in range(0, len(sequences), BATCH):
        part = sequences[first:first + BATCH]
        longest = max(len(one.ids) for one in part)
        ids, weight = torch.full((len(part), longest), pad), torch.zeros(len(part), longest)
        for row, one in enumerate(part):
            ids[row, :len(one.ids)] = torch.from_numpy(one.ids)
            weight[row, :len(one.ids)] = torch.from_numpy(one.loss_weight)
        logits = model(input_ids=ids).logits[:, :-1].float()  # causal: padding behind changes nothing before it
        chosen = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums.append((chosen * weight[:, 1:]).sum(-1))
        counts.append(weight[:, 1:].sum(-1))
    return torch.cat(sums), torch.cat(counts)
