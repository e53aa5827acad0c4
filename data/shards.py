"""Raw shards: tar files of interleaved documents, in webdataset's layout.

A *sample* is the tar members that share a key: `KEY.json` and the picture files that it names.

    KEY.json   {"texts": ["a red circle", null], "images": [null, "0.png"], "captions": […], "questions": [[q, a], …]}
    KEY.0.png

`texts` and `images` are parallel lists, one of the two null at each place: the layout of OBELICS (Laurençon et al. 2023,
arXiv:2306.16527) and of Energon's interleaved samples. Everything else is optional; a conversation has `roles` beside them. The spec is
in README.md.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data import store, tar
from data.document import Document, check_roles
from data.files import written

MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg"}


def extension_of(file: bytes) -> str | None:
    """What the bytes say they are, whatever the file was called; None for what raw shards do not hold."""
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in MAGIC.items() if file.startswith(magic)), None)


def sample_of(document: Document) -> dict[str, object]:
    """Document → webdataset sample; pictures are called what their bytes are."""
    if "." in document.key or "/" in document.key:
        raise ValueError(f"sample key {document.key!r} holds a dot or a slash, which ends a key in a tar")
    texts = [part if isinstance(part, str) else None for part in document.parts]
    names = [None if isinstance(part, str) else f"{i}.{extension_of(part) or 'png'}" for i, part in enumerate(document.parts)]
    record: dict[str, object] = {"texts": texts, "images": names}
    if document.captions:
        record["captions"] = document.captions
    if document.questions:
        record["questions"] = document.questions
    if document.meta:
        record["meta"] = document.meta
    if document.roles:
        record["roles"] = document.roles
    sample: dict[str, object] = {"__key__": document.key, "json": json.dumps(record, ensure_ascii=False).encode()}
    for name, part in zip(names, document.parts, strict=True):
        if name is not None:
            sample[name] = part
    return sample


def document_of(sample: dict[str, bytes | str]) -> Document:
    """Webdataset sample → document. Errors: ValueError "no document: …" that says what is missing."""
    key = str(sample["__key__"])
    if "json" not in sample:
        raise ValueError(f"no document: it has no {key}.json (members: {sorted(k for k in sample if k[0] != '_')})")
    try:
        record = json.loads(sample["json"])
        texts, images = _listed(record["texts"]), _listed(record["images"])
        if len(texts) != len(images) or any((a is None) == (b is None) for a, b in zip(texts, images, strict=True)):
            raise ValueError("at each place of `texts` and `images` one must be null and the other not")
        if not texts:
            raise ValueError("`texts` and `images` are empty")
        parts: list[str | bytes] = []
        for text, name in zip(texts, images, strict=True):
            if text is None and (name == "json" or not isinstance(sample.get(name), bytes)):
                raise ValueError(f"it names picture {name}, which the tar does not hold")
            parts.append(_said(text) if text is not None else sample[name])
        questions = [_listed(pair) for pair in _listed(record.get("questions", []))]
        if not isinstance(meta := record.get("meta", {}), dict):
            raise ValueError(f"`meta` is {meta!r}")
        document = Document(key, tuple(parts), tuple(_said(words) for words in _listed(record.get("captions", []))),
                            tuple((_said(q), _said(a)) for q, a in questions), meta, tuple(_listed(record.get("roles", []))))
        check_roles(document)
        return document
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no document: {key}.json: {error if type(error) is ValueError else repr(error)}") from error


def _listed(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return value


def _said(words: object) -> str:
    """A text as it came out of JSON, which may hold numbers, and halves of characters that no encoding has."""
    if not isinstance(words, str):
        raise ValueError(f"a text is {words!r}")
    if not words.isascii():
        words.encode()  # UnicodeEncodeError
    return words


def write(documents: Iterable[Document], folder: Path, prefix: str, shard_len: int = 4096) -> list[Path]:
    """Write documents as `PREFIX-000000.tar`, …; each shard appears whole or not at all. → paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    batch: list[Document] = []

    def flush() -> None:
        path = folder / f"{prefix}-{len(paths):06d}.tar"
        write_tar(path, map(sample_of, batch))
        paths.append(path)
        batch.clear()

    for document in documents:
        batch.append(document)
        if len(batch) == shard_len:
            flush()
    if batch:
        flush()
    return paths


def write_tar(path: Path, samples: Iterable[Mapping[str, object]]) -> None:
    """Write samples; a reader never sees half a shard. Same samples, same bytes."""
    with written(path) as beside, beside.open("wb") as file:
        tar.write(file, (member for sample in samples for member in _members(sample)))


def _members(sample: Mapping[str, object]) -> Iterator[tuple[str, bytes]]:
    for extension in sorted(sample):
        content = sample[extension]
        if extension != "__key__":
            assert isinstance(content, bytes), f"{extension} of sample {sample['__key__']} is no bytes"
            yield f"{sample['__key__']}.{extension}", content


def read(path: Path) -> Iterator[Document]:
    """Documents of one shard. Errors: ValueError that names the shard, and the sample where it is known."""
    for sample in samples(path):
        try:
            document = document_of(sample)
        except ValueError as error:
            raise ValueError(f"{path}: sample {sample['__key__']}: {error}") from error
        yield document


def samples(path: Path) -> Iterator[dict[str, bytes | str]]:
    """Webdataset samples of one tar, undecoded. Errors: ValueError that names a shard that is damaged; OSError for a store that fails."""
    if store.url(path) is None and not path.is_file():
        raise FileNotFoundError(f"shard {path} does not exist")
    whole = 0
    with tar.opened(path) as content:
        try:
            for sample in _grouped((m.name, content[m.first:m.first + m.size]) for m in tar.members(content)):
                yield sample
                whole += 1
        except (ValueError, OSError) as error:
            raise ValueError(f"shard {path} is truncated or no tar, after {whole} whole samples: {error}. "
                             "Write it again, or remove it") from error


def _grouped(files: Iterable[tuple[str, bytes]]) -> Iterator[dict[str, bytes | str]]:
    """(name, content) → samples, as webdataset's `group_by_keys` makes them: neighbours that share a key; the rest of the name in lower
    case says which is which."""
    sample: dict[str, bytes | str] = {}
    for name, content in files:
        place = tar.key_of(name)
        if place is None:
            continue
        key, extension = place[0], place[1].lower()
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        if extension in sample:
            raise ValueError(f"there are two members {key}.{extension}")
        sample.setdefault("__key__", key)
        sample[extension] = content
    if sample:
        yield sample


def find(folder: Path, prefix: str = "") -> list[Path]:
    """The shards of a folder, or below a URL, sorted. Errors: FileNotFoundError for a missing or empty folder."""
    if store.url(folder) is None and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name one that holds {prefix or '*'}-000000.tar, …")
    names = [name for name in store.names(folder) if name.startswith(prefix) and name.endswith(".tar")]
    if not names:
        raise FileNotFoundError(f"{folder} holds no shard named {prefix}*.tar")
    return [folder / name for name in names]


def read_all(paths: Iterable[Path]) -> Iterator[Document]:
    for path in paths:
        yield from read(path)
