"""Does the model answer questions about pictures? By what is asked, and by the kind of the answer.

Kinds of answers are VQA's (Goyal et al. 2017, arXiv:1612.00837, section 3): yes or no, a number, other. What is asked is `meta.kinds` of
the document where it says so, else the first two words, much as VQA's question types. An answer is right when it is the expected one but
for case, blanks and a full stop. The questions of one picture are one unit: its answers are right or wrong together.
"""

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mmllm.evaluate.bootstrap import Measure
from mmllm.evaluate.client import ask
from mmllm.evaluate.items import coded
from mmllm.evaluate.task import Example, Given, Record, Scores, Task, Unit, by_split

NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "none"}
FEW = 10
"""Questions, below which what is asked is counted among the rest."""
CLIENTS = 8
"""Requests that a server is given at once."""


def units(given: Given) -> list[Unit]:
    return [Unit(item.name, item.split, item) for item in given.items if item.document.questions
            and sum(isinstance(part, bytes) for part in item.document.parts) == 1]


def run(given: Given, some: list[Unit]) -> list[Record]:
    codes = coded(given.engine, [unit.work.picture for unit in some], [unit.name for unit in some])
    flat = [(place, question) for place, unit in enumerate(some) for question, _ in unit.work.document.questions]
    said = given.engine.describe([codes[place] for place, _ in flat], [question for _, question in flat],
                                 max_text=given.settings.max_text)
    return _records(some, said)


def served_units(given: Given) -> list[Unit]:
    return units(given) if given.settings.server else []


def run_served(given: Given, some: list[Unit]) -> list[Record]:
    """The same questions over the wire."""
    address = given.settings.server
    assert address is not None, "units without a server"
    flat = [(unit.work.picture, question) for unit in some for question, _ in unit.work.document.questions]
    with ThreadPoolExecutor(CLIENTS) as clients:
        said = list(clients.map(lambda one: ask(address, [one[0]], one[1], given.settings.max_text), flat))
    return _records(some, said)


def _records(some: list[Unit], said: list[str]) -> list[Record]:
    records, answers = list[Record](), iter(said)
    for unit in some:
        document = unit.work.document
        kinds = document.meta.get("kinds", [first_words(question) for question, _ in document.questions])
        records.append({"name": unit.name, "split": unit.split, "answers": [
            {"kind": kind, "question": question, "expected": expected, "said": next(answers)}
            for kind, (question, expected) in zip(kinds, document.questions, strict=True)]})
    return records


def first_words(question: str) -> str:
    return " ".join(question.lower().split()[:2])


def right(said: str, expected: str) -> bool:
    return plain(said) == plain(expected)


def plain(answer: str) -> str:
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def kind_of_answer(expected: str) -> str:
    words = plain(expected)
    return "yes/no" if words in ("yes", "no") else "number" if words in NUMBERS or re.fullmatch(r"[\d.,]+", words) else "other"


def score(given: Given, records: list[Record]) -> Scores:
    """Share of right answers: overall, by kind of answer, and by what is asked."""
    measures: dict[str, Measure] = {}
    for split, some in by_split(records).items():
        found: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(some), 2)))  # noqa: B023
        for row, one in enumerate(some):
            for answer in one["answers"]:
                kinds = "overall", f"answer {kind_of_answer(answer['expected'])}", f"asked {answer['kind']}"
                for kind in kinds:
                    found[kind][row] += right(answer["said"], answer["expected"]), 1
        rest = {kind: rows for kind, rows in found.items() if kind.startswith("asked ") and rows[:, 1].sum() < FEW}
        kept = {kind: rows for kind, rows in found.items() if kind not in rest}
        if rest:
            kept["asked the rest"] = np.sum(list(rest.values()), 0)
        order = sorted(kept, key=lambda kind: (kind != "overall", kind))
        for kind in order:
            asked = kept[kind][:, 1] > 0  # a picture without such a question is no unit of its measure
            names = tuple(one["name"] for one, there in zip(some, asked, strict=True) if there)
            measures[f"{split}/{kind}"] = Measure(units=names, rows=kept[kind][asked])
    return Scores(measures=measures)


def show(given: Given, record: Record) -> Example:
    return Example([given.picture(record["name"])], [(f"{one['question']} {one['said']}", right(one["said"], one["expected"]))
                                                     for one in record["answers"]])


QUESTIONS = Task(units=units, run=run, score=score, show=show, decided_by=("max_text",),
                 lacking="the shards hold no picture with questions (SHARDS, --prefix)")
SERVED = Task(units=served_units, run=run_served, score=score, show=show, decided_by=("max_text", "server"),
              lacking="no server given (--server), or no picture with questions")
