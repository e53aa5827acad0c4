"""Captions come from a file by key; what has no line, and lines that nobody has, are counted."""

import json
from pathlib import Path
from typing import Literal

import pytest

from data import shards
from data.curate.captions import Lines, Recaption, captions_in, recaption
from data.curate.rewrite import Report
from data.document import Document

DOCUMENTS = [
    Document("pair", (b"png", "old"), captions=("older",), questions=(("q", "a"),), meta={"n": 1}),
    Document("reverse", ("old", b"png")),
    Document("bare", (b"png",)),
    Document("missing", (b"png", "old")),
    Document("two", (b"png", "old", b"gnp")),
    Document("chat", (b"png", "what?", "that"), roles=("user", "user", "assistant")),
    Document("text", ("old",)),
]
LINES = [{"key": "pair", "caption": "new"}, {"key": "reverse", "captions": ["new", "old", "newer"]}, {"key": "nobody", "caption": "x"},
         {"key": "bare", "caption": " naked "}, *({"key": key, "caption": "x"} for key in ("two", "chat", "text")),
         {"key": "pair", "caption": "newest"}, {"key": "empty", "caption": " "}, {"caption": "whose?"}, {"key": "nobody", "caption": "y"}]


def run(folder: Path, how: Literal["replace", "add"] = "replace", missing: Literal["keep", "drop"] = "keep",
        processes: int = 1) -> tuple[Report, Lines, dict[str, Document]]:
    source = shards.write(DOCUMENTS, folder / "raw", "train", 3)
    (folder / "new.jsonl").write_text("\n".join([*map(json.dumps, LINES), "{broken", ""]))
    report, lines = recaption(source, folder / "out", Recaption(captions=folder / "new.jsonl", how=how, missing=missing), processes)
    return report, lines, {d.key: d for d in shards.read_all(shards.find(folder / "out"))}


def test_captions_are_replaced_and_all_keys_accounted_for(tmp_path: Path) -> None:
    report, lines, found = run(tmp_path)
    assert found["pair"] == Document("pair", (b"png", "new"), ("newest",), (("q", "a"),), {"n": 1})
    assert found["reverse"] == Document("reverse", ("new", b"png"), ("old", "newer")) and found["bare"].parts == (b"png", "naked")
    assert all(found[d.key] == d for d in DOCUMENTS[3:])
    assert (report.read, report.kept, report.changed) == (7, 7, 3)
    assert dict(report.noted.causes) == {"no caption for it": 1, "takes no caption": 3}
    assert report.noted.first["no caption for it"] == "missing"
    assert (lines.keys, lines.unknown) == (7, 1) and dict(lines.bad.causes) == {"empty caption": 1, "no captions": 2}
    assert json.loads((tmp_path / "out" / "curation.json").read_text())["captions"]["unknown"] == 1


def test_or_added_behind_those_that_are_there(tmp_path: Path) -> None:
    _, _, found = run(tmp_path, "add")
    assert found["pair"].parts == (b"png", "old") and found["pair"].captions == ("older", "new", "newest")
    assert found["reverse"].captions == ("new", "newer") and found["bare"].parts == (b"png", "naked")


def test_and_what_has_none_may_go(tmp_path: Path) -> None:
    report, lines, found = run(tmp_path, missing="drop")
    assert "missing" not in found and len(found) == 6 and report.dropped.first == {"no caption for it": "missing"} and lines.unknown == 1


@pytest.mark.parametrize("line", [b"[]", b"3", b'{"key": 3, "caption": "x"}', b'{"key": "a", "captions": "x"}', b'{"key": "a"}',
                                  b'{"key": "a", "captions": []}', b'{"key": "a", "caption": "\\ud800"}', b"\xff"])
def test_a_line_that_is_none_says_so(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(no captions|empty caption): "):
        captions_in(line)


def test_another_file_goes_to_another_folder(tmp_path: Path) -> None:
    run(tmp_path)
    LINES.append({"key": "missing", "caption": "found"})
    try:
        with pytest.raises(ValueError, match="was made with captions = "):
            run(tmp_path)
    finally:
        LINES.pop()
