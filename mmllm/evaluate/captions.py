"""Does the model describe pictures as people do? Its words beside all texts of the picture.

BLEU, CIDEr and ROUGE-L by pycocoevalcap: the code behind the numbers of COCO's papers, so ours mean the same. (sacrebleu is better kept but
its BLEU cuts words otherwise, and it has no CIDEr.) It keeps what each picture contributed, which is what an interval needs.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data.scenes.text import caption_exact
from data.scenes.world import Scene
from mmllm.evaluate.bootstrap import Measure, mean
from mmllm.evaluate.items import coded
from mmllm.evaluate.task import Example, Given, Record, Scores, Task, Unit, by_split

LENGTHS = 4
"""Longest n-gram of BLEU and CIDEr."""


def units(given: Given) -> list[Unit]:
    return [Unit(item.name, item.split, item) for item in given.items if item.is_pair]


def run(given: Given, some: list[Unit]) -> list[Record]:
    codes = coded(given.engine, [unit.work.picture for unit in some], [unit.name for unit in some])
    said = given.engine.describe(codes, max_text=given.settings.max_text)
    records: list[Record] = []
    for unit, words in zip(some, said, strict=True):
        record: Record = {"name": unit.name, "split": unit.split, "said": words, "references": list(unit.work.texts)}
        if scene := unit.work.document.meta.get("scene"):
            record["scene_exact"] = caption_exact(words, Scene.from_json(scene))
        records.append(record)
    return records


def score(given: Given, records: list[Record]) -> Scores:
    """bleu_1 … bleu_4 of the whole set, cider (× 1, in [0, 10]) and rouge_l means over pictures, `exact` the share that says one of the
    texts word by word, `scene_exact` that which states all of a scene and nothing else."""
    measures: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    for split, some in by_split(records).items():
        names = [one["name"] for one in some]
        measures[f"{split}/exact"] = mean(names, [one["said"].strip() in one["references"] for one in some])
        if "scene_exact" in some[0]:
            measures[f"{split}/scene_exact"] = mean(names, [one["scene_exact"] for one in some])
        try:
            said, references = tokenized(some, given.settings.words)
            found = overlap(said, references)
        except (ImportError, FileNotFoundError) as error:
            missing["bleu, cider, rouge_l"] = str(error)
            continue
        for length in range(1, LENGTHS + 1):
            columns = [*range(length), *range(LENGTHS, LENGTHS + length), -2, -1]
            measures[f"{split}/bleu_{length}"] = Measure(units=tuple(names), rows=found["bleu"][:, columns], of="bleu")
        measures |= {f"{split}/{name}": mean(names, found[name]) for name in ("cider", "rouge_l")}
    tokens = {"plain": "lower-case words without punctuation", "ptb": "Penn Treebank's tokens, as COCO's scores"}[given.settings.words]
    notes = [f"Captions are cut into {tokens} (--words). CIDEr weighs n-grams by how many pictures of the split have them: it compares "
             "models on one set, not sets."]
    return Scores(measures=measures, missing=missing, notes=notes)


def tokenized(records: Sequence[Record], words: Literal["plain", "ptb"]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """→ what was said and the references of each, as tokens joined by blanks. Errors: FileNotFoundError without java."""
    said = {i: [one["said"]] for i, one in enumerate(records)}
    references = {i: one["references"] for i, one in enumerate(records)}
    if words == "plain":
        return _plain(said), _plain(references)
    if shutil.which("java") is None:
        raise FileNotFoundError("--words ptb needs java (apt-get install default-jre-headless); --words plain does not")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    cut: Any = PTBTokenizer()
    return tuple(cut.tokenize({i: [{"caption": text} for text in texts] for i, texts in of.items()})
                 for of in (said, references))  # pyright: ignore[reportReturnType]


def _plain(texts: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    return {i: [" ".join(re.findall(r"\w+(?:['’]\w+)*", text.lower())) for text in some] for i, some in texts.items()}


def overlap(said: dict[int, list[str]], references: dict[int, list[str]]) -> dict[str, Any]:
    """→ `bleu` [n, 2 · 4 + 2], columns of `bootstrap._bleu`; `cider` [n], `rouge_l` [n]. Errors: ImportError without pycocoevalcap."""
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("pycocoevalcap is not installed: pip install 'mmllm[eval]'") from error
    bleu: Any = BleuScorer(n=LENGTHS)
    for i, words in said.items():
        bleu += (words[0], references[i])
    rows = [[*one["correct"], *one["guess"], one["testlen"], min((abs(length - one["testlen"]), length) for length in one["reflen"])[1]]
            for one in bleu.ctest]
    return {"bleu": np.array(rows, np.float64), "cider": Cider().compute_score(references, said)[1],
            "rouge_l": Rouge().compute_score(references, said)[1]}


def show(given: Given, record: Record) -> Example:
    right = record.get("scene_exact", record["said"].strip() in record["references"] or None)
    return Example([given.picture(record["name"])], [(record["said"], right), (record["references"][0], None)])


CAPTIONS = Task(units=units, run=run, score=score, show=show, decided_by=("max_text",),
                lacking="the shards hold no picture with one text (SHARDS, --prefix)")
