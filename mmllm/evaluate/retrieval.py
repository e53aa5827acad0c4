"""Does the model know which text belongs to which picture? By likelihood, among `candidates` of each, in four ways.

    reads, picture to text    log p(text | picture) over texts        reads, text to picture    the same over pictures
    draws, picture to text    log p(picture | text) over texts        draws, text to picture    the same over pictures

Where one side stays and it is the one that is scored, what is likely anyhow cancels ("reads, text to picture", "draws, picture to text");
the other two favour what is common, as a model's own choice would.

Letters: c candidates.
"""

import numpy as np
from numpy.typing import NDArray

from mmllm.evaluate.bootstrap import Measure, mean
from mmllm.evaluate.items import coded
from mmllm.evaluate.likelihood import log_likelihood
from mmllm.evaluate.task import Given, Record, Scores, Task, Unit

TOP = (1, 5)


def units(given: Given) -> list[Unit]:
    """Sets of c pairs of one split; a remainder is left out, a small split is one set."""
    out: list[Unit] = []
    for split in dict.fromkeys(item.split for item in given.items):
        pairs = [item for item in given.items if item.split == split and item.is_pair]
        c = min(given.settings.candidates, len(pairs))
        if c > 1:
            out += [Unit(f"{split}/{c} from {first}", split, pairs[first:first + c]) for first in range(0, len(pairs) - c + 1, c)]
    return out


def run(given: Given, some: list[Unit]) -> list[Record]:
    records: list[Record] = []
    for unit in some:
        codes = coded(given.engine, [item.picture for item in unit.work], [item.name for item in unit.work])
        texts = [item.texts[0] for item in unit.work]
        c = len(texts)
        found = log_likelihood(given.engine, codes, texts, [(i, j) for i in range(c) for j in range(c)])
        records.append({"name": unit.name, "split": unit.split, "keys": [item.name for item in unit.work], "texts": texts,
                        **{way: found[way].view(c, c).tolist() for way in ("text", "image")}})  # [picture][text]
    return records


def ranks(values: NDArray[np.float64], texts: list[str]) -> NDArray[np.int64]:
    """Of each row's own column: how many others score as high or higher. Columns that bear the same text as the row's are no others."""
    same = np.array([[a == b for b in texts] for a in texts])
    own = np.diag(values)[:, None]
    return np.where(same, False, values >= own).sum(1)


def score(given: Given, records: list[Record]) -> Scores:
    """R@k: the share of pictures (texts) whose own text (picture) is among the k likeliest of the set."""
    measures: dict[str, Measure] = {}
    for split in dict.fromkeys(one["split"] for one in records):
        some = [one for one in records if one["split"] == split]
        names = [key for one in some for key in one["keys"]]
        sets, c = len(some), len(some[0]["keys"])
        for way, verb in (("text", "reads"), ("image", "draws")):
            for to, turn in (("picture to text", False), ("text to picture", True)):
                found = np.concatenate([ranks(np.array(one[way]).T if turn else np.array(one[way]), one["texts"]) for one in some])
                for k in TOP:
                    if k < c:
                        measures[f"{split}/{verb}, {to}, R@{k} of {c}"] = mean(names, found < k)
        assert len(names) == sets * c, "sets of a split are of one size"
    chance = ", ".join(dict.fromkeys(f"{1 / len(one['keys']):.3f}" for one in records))
    return Scores(measures=measures, notes=[
        f"R@1 by chance: {chance}. Candidates that bear the same text are not held against each other."])


RETRIEVAL = Task(units=units, run=run, score=score, decided_by=("candidates",), at_once=1,
                 lacking="the shards hold no two pictures with a text (SHARDS, --prefix)")
