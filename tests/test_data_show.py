"""The page shows what is in the shards, as it is trained on, and holds nothing that a reader's browser would run or fetch."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_model import saved_visual_tokenizer, sentences, text_tokenizer, visual_tokenizer, vocabulary

from data import shards, show_page
from data.config import DataConfig
from data.document import Document
from data.encode import encode
from data.images import to_png
from data.loader import Loader
from data.show import show, weights_of
from mmllm.verbs.inspect import Show, data_show

EVIL = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>&amp;\x00\x1b[2J"
CONFIG = DataConfig(prefix="", row_len=256, long_documents="split")


class Reading(HTMLParser):
    """What a page holds: tags, what they fetch, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self.titles = list[str](), list[tuple[str, str | None]](), "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reading:
    page = Reading(path.read_text())
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert all(value and value.startswith("data:image/") for name, value in page.attributes if name in ("src", "href"))
    assert not any(name.startswith("on") for name, _ in page.attributes) and "@import" not in page.text and "url(" not in page.text
    return page


def png(number: int, side: int = 24) -> bytes:
    return to_png(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))


DOCUMENTS = [Document("pair", (png(0), "a red circle"), (EVIL,), ((EVIL, "an answer"),), {"what": EVIL}),
             Document("talk", ("be kind", png(1), "what is it?", "a star"), roles=("system", "user", "user", "assistant")),
             Document("evil", (EVIL, png(2, 500), "")), Document("bad", (b"junk", "words")), Document("long", ("x" * 5000,))]


def test_raw_documents_are_shown_whole_and_escaped(tmp_path: Path) -> None:
    shards.write(DOCUMENTS, tmp_path / "raw", "train", 2)
    samples = [{"__key__": "none", "json": b"{}"}]
    shards.write_tar(tmp_path / "raw/train-000009.tar", samples)
    page = read(show(tmp_path / "raw", tmp_path / "out/page.html", CONFIG))
    for words in ("a red circle", "be kind", "what is it?", "an answer", "<script>alert(1)</script>", "none.json", "1,000 more characters",
                  "begins as none that is known", "500 × 500 PNG"):
        assert words in page.text, words
    assert page.tags.count("img") == 3 and [("class", f"turn {role}") in page.attributes for role in ("system", "user", "assistant")]
    assert "\x00" not in page.text and len((tmp_path / "out/page.html").read_bytes()) < 400_000


def test_documents_come_from_shards_all_over_the_folder(tmp_path: Path) -> None:
    shards.write((Document(f"d{i:02d}", ("a",)) for i in range(40)), tmp_path, "train", 4)
    keys = re.findall(r"<h3>(d\d\d)</h3>", show(tmp_path, tmp_path / "page.html", CONFIG, documents=6).read_text())
    assert keys == ["d00", "d01", "d08", "d09", "d16", "d17", "d24", "d25", "d32", "d33"]
    with pytest.raises(FileNotFoundError, match="no shard named test"):
        data_show(Show(folder=tmp_path, out=tmp_path / "page.html", prefix="test"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    words = iter(sentences(60, seed=5))
    documents = [Document(f"d{i:02d}", (png(i), next(words)), (next(words),), ((next(words), next(words)),)) for i in range(9)]
    documents += [Document("talk", (next(words), png(1), "what <b>is</b> it?", "a star"), roles=("system", "user", "user", "assistant"))]
    shards.write(documents, folder / "raw", "train", 6)
    saved_visual_tokenizer(folder, 2, 48)
    text_tokenizer().save(folder / "text.model")
    encode(shards.find(folder / "raw"), folder / "tokens", visual_tokenizer(2, 48), text_tokenizer(), vocabulary())
    return folder


def test_every_token_of_a_row_is_there_with_its_id_and_weight(world: Path, tmp_path: Path) -> None:
    page = read(show(world / "tokens", tmp_path / "page.html", CONFIG, rows=2))
    loader = Loader(DataConfig(shards=world / "tokens", prefix="", row_len=256, long_documents="split"))
    wanted: list[tuple[int, bool]] = []
    for number in range(2):
        row = loader.row(number)
        end = row.cu_seqlens[len(row.keys)]
        wanted += zip(row.tokens[:end].tolist(), (weights_of(row)[:end] > 0).tolist(), strict=True)
    shown = [title for title in page.titles if re.match(r"\d+ ", title) and "tokens" not in title and " to " not in title]
    assert [(int(title.split()[0]), "weight 0" not in title) for title in shown] == wanted
    assert page.text.count("Row ") == 2 and "img" not in page.tags and "padding" in page.text


def test_with_tokenizers_pictures_and_words_are_shown_and_originals_beside_them(world: Path, tmp_path: Path) -> None:
    visual = world / "visual-2-48"
    page = read(show(world / "tokens", tmp_path / "page.html", CONFIG, rows=2, raw=world / "raw", tokenizer=visual,
                     text=world / "text.model"))
    loader = Loader(DataConfig(shards=world / "tokens", prefix="", row_len=256, long_documents="split"))
    rows = [loader.row(number) for number in range(2)]
    pictures = sum(int((row.tokens == vocabulary().boi).sum()) for row in rows)
    originals = {d.key: sum(isinstance(part, bytes) for part in d.parts) for d in shards.read_all(shards.find(world / "raw"))}
    assert page.tags.count("img") == pictures + sum(originals[key] for row in rows for key in row.keys)
    assert page.text.count("18 codes") == pictures and page.tags.count("aside") == sum(len(row.keys) for row in rows)


def test_the_weight_of_a_token_is_that_of_predicting_it(world: Path) -> None:
    row = Loader(DataConfig(shards=world / "tokens", row_len=256)).row(0)
    weights = weights_of(row)
    for first, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
        assert weights[first] == 0 and np.array_equal(weights[first + 1:end], row.loss_weight[first:end - 1])
    token = show_page.Token(7, "t", "<b>", 0.25)
    assert show_page.span(token) == "<b class='t' style=--w:0.25 title=\"7 &lt;b&gt; · weight 0.25\">&lt;b&gt;</b>"


def test_tokenizers_that_did_not_make_the_shards_are_refused(world: Path, tmp_path: Path) -> None:
    other = saved_visual_tokenizer(tmp_path, 2, 32)
    with pytest.raises(ValueError, match="2 books of 32 codes, the token shards were made with 2 of 48: name the visual"):
        show(world / "tokens", tmp_path / "page.html", CONFIG, tokenizer=other)
    (tmp_path / "text.model").write_bytes((world / "text.model").read_bytes())
    with pytest.raises(FileNotFoundError):
        show(world / "tokens", tmp_path / "page.html", CONFIG, tokenizer=tmp_path / "nowhere")


def test_the_command_writes_the_page(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_show(Show(folder=world / "tokens", out=tmp_path / "page.html", row_len=64, rows=1))
    assert capsys.readouterr().out == f"page: {tmp_path / 'page.html'}\n" and "Row 0" in (tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match="must be at least 1"):
        data_show(Show(folder=world / "tokens", out=tmp_path / "page.html", rows=0))
