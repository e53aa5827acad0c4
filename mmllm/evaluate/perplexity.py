"""How well the model foresees documents, by modality: in bits, so that models with other vocabularies compare.

    text after its picture, picture after its text     of a pair, each the way the folder was trained to (`likelihood`)
    text, picture                                      of what is read in order, or said by the assistant of a conversation

Bits a byte of text are of its UTF-8 bytes, the tokens that end it included; they do not depend on the text tokenizer. Bits of a picture are
those of its codes; a byte is one of its 3 · H · W values, of which codes keep but a part, so these compare models of one visual tokenizer.
"""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from data import sequence
from data.document import texts_of
from data.sequence import TokenSequence
from data.tokens import Coded, said_in, token_document
from mmllm.evaluate.bootstrap import Measure
from mmllm.evaluate.items import Item, coded
from mmllm.evaluate.likelihood import drawing, log_probabilities, reading
from mmllm.evaluate.task import Given, Record, Scores, Task, Unit, by_split


def units(given: Given) -> list[Unit]:
    return [Unit(item.name, item.split, item) for item in given.items]


def run(given: Given, some: list[Unit]) -> list[Record]:
    engine = given.engine
    vocab = engine.folder.vocab
    pictures = [(part, unit.name) for unit in some for part in unit.work.document.parts if isinstance(part, bytes)]
    codes = iter(coded(engine, [file for file, _ in pictures], [name for _, name in pictures]))
    asked: list[tuple[Record, str, TokenSequence, int]] = []
    records: list[Record] = []
    for unit in some:
        item: Item = unit.work
        record: Record = {"name": unit.name, "split": unit.split, "found": {}}
        records.append(record)
        own = [next(codes) for part in item.document.parts if isinstance(part, bytes)]
        said = next(part for part in item.document.parts if isinstance(part, str)) if item.is_pair else ""
        if item.is_pair:
            asked += [(record, "text after its picture", reading(engine, own[0], said), len(said.encode())),
                      (record, "picture after its text", drawing(engine, own[0], said), pixels(given, own))]
            continue
        document, joined = item.document, said_in([item.document], engine.folder.text)[0]
        shown = [Coded((int(one.shape[1]), int(one.shape[2])), vocab.image_ids(one)) for one in own]
        tokens = token_document(document, joined, shown)
        whole = (sequence.chat if document.roles else sequence.interleaved)(tokens, vocab)
        spoken = [part for part, role in zip(document.parts, document.roles or ("assistant",) * len(document.parts), strict=True)
                  if role == "assistant"]
        if len(whole.ids) > engine.folder.max_len:
            record["longer"] = len(whole.ids)
            continue
        drawn = [one for one, role in zip(own, _roles_of_pictures(item), strict=True) if role == "assistant"]
        text_bytes = sum(len(part.encode()) for part in (spoken if document.roles else texts_of(document)) if isinstance(part, str))
        asked += [(record, "text", whole, text_bytes), *([(record, "picture", whole, pixels(given, drawn))] if drawn else [])]
    for (record, what, one, size), values in zip(asked, log_probabilities(engine, [one for _, _, one, _ in asked]), strict=True):
        is_code = torch.from_numpy(one.ids[1:]) >= vocab.first_image
        counted = torch.from_numpy(one.loss_weight[1:] > 0) & (is_code if what.startswith("picture") else ~is_code)
        record["found"][what] = [-float(values[counted].double().sum()), int(counted.sum()), size]
    return records


def _roles_of_pictures(item: Item) -> list[str]:
    roles = item.document.roles or ("assistant",) * len(item.document.parts)
    return [role for role, part in zip(roles, item.document.parts, strict=True) if isinstance(part, bytes)]


def pixels(given: Given, codes: list[Any]) -> int:
    """Values of so many pictures: 3 · H · W each."""
    patch = given.engine.visual.patch_size
    return sum(3 * one.shape[1] * one.shape[2] * patch * patch for one in codes)


def score(given: Given, records: list[Record]) -> Scores:
    """perplexity: e to the nats a token (of text, its end included) or a code; bits/code; bits/byte."""
    measures: dict[str, Measure] = {}
    for split, some in by_split(records).items():
        rows: dict[str, list[tuple[str, list[float]]]] = defaultdict(list)
        for one in some:
            for what, found in one["found"].items():
                rows[what].append((one["name"], found))
        for what, known in sorted(rows.items()):
            names, (nats, tokens, size) = tuple(name for name, _ in known), np.array([found for _, found in known], np.float64).T
            kinds = {"perplexity": ("exp", nats, tokens), "bits/byte": ("ratio", nats / math.log(2), size)}
            if what.startswith("picture"):
                kinds["bits/code"] = ("ratio", nats / math.log(2), tokens)
            for kind, (of, above, below) in kinds.items():
                measures[f"{split}/{what}, {kind}"] = Measure(units=names, rows=np.stack([above, below], 1), of=of, better=-1)
    longer = [one["name"] for one in records if "longer" in one]
    vocab = given.folder.vocab
    notes = [f"A code that is one of {vocab.codebook_size} by chance has {math.log2(vocab.codebook_size):.2f} bits."]
    if longer:
        notes.append(f"{len(longer)} documents are longer than the model reads ({given.folder.max_len:,} tokens) and left out, "
                     f"the first: {longer[0]}")
    return Scores(measures=measures, notes=notes)


PERPLEXITY = Task(units=units, run=run, score=score, lacking="no shards given (SHARDS)")
