"""Raw shards: tar files of interleaved documents, in webdataset's layout.

A *sample* is the tar members that share a key: `KEY.json` and the picture files that it names.

    KEY.json   {"texts": ["a red circle", null], "images": [null, "0.png"], "captions": […], "questions": [[q, a], …]}
    KEY.0.png

`texts` and `images` are parallel lists, one of the two null at each place: the layout of OBELICS (Laurençon et al. 2023,
arXiv:2306.16527) and of Energon's interleaved samples. Everything else is optional. The spec is in README.md.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from data.document import Document


def sample_of(document: Document, extension: str = "png") -> dict[str, object]:
    """Document → webdataset sample."""
    if "." in document.key or "/" in document.key:
        raise ValueError(f"sample key {document.key!r} holds a dot or a slash, which ends a key in a tar")
    texts = [part if isinstance(part, str) else None for part in document.parts]
    names = [None if isinstance(part, str) else f"{i}.{extension}" for i, part in enumerate(document.parts)]
    record: dict[str, object] = {"texts": texts, "images": names}
    if document.captions:
        record["captions"] = document.captions
    if document.questions:
        record["questions"] = document.questions
    if document.meta:
        record["meta"] = document.meta
    sample: dict[str, object] = {"__key__": document.key, "json": json.dumps(record, ensure_ascii=False).encode()}
    for name, part in zip(names, document.parts, strict=True):
        if name is not None:
            sample[name] = part
    return sample


def document_of(sample: dict[str, bytes | str], shard: Path) -> Document:
    """Webdataset sample → document. Errors: ValueError that names shard, key and what is missing."""
    key = str(sample["__key__"])
    where = f"{shard}: sample {key}"
    if "json" not in sample:
        raise ValueError(f"{where} has no {key}.json (members: {sorted(k for k in sample if k[0] != '_')})")
    try:
        record = json.loads(sample["json"])
        texts, images = record["texts"], record["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {key}.json is no document: {error!r}") from error
    if len(texts) != len(images) or any((a is None) == (b is None) for a, b in zip(texts, images, strict=True)):
        raise ValueError(f"{where}: at each place of `texts` and `images` one must be null and the other not")
    parts: list[str | bytes] = []
    for text, name in zip(texts, images, strict=True):
        if text is None and name not in sample:
            raise ValueError(f"{where} names picture {name}, which the tar does not hold")
        part = text if text is not None else sample[name]
        parts.append(part)
    return Document(key, tuple(parts), tuple(record.get("captions", ())),
                    tuple((q, a) for q, a in record.get("questions", ())), record.get("meta", {}))


def write(documents: Iterable[Document], folder: Path, prefix: str, shard_len: int = 4096,
          extension: str = "png") -> list[Path]:
    """Write documents as `PREFIX-000000.tar`, …; each shard appears whole or not at all. → paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    batch: list[Document] = []

    def flush() -> None:
        path = folder / f"{prefix}-{len(paths):06d}.tar"
        write_tar(path, (sample_of(document, extension) for document in batch))
        paths.append(path)
        batch.clear()

    for document in documents:
        batch.append(document)
        if len(batch) == shard_len:
            flush()
    if batch:
        flush()
    return paths


def write_tar(path: Path, samples: Iterable[dict[str, object]]) -> None:
    """Write samples beside `path` and rename: a reader never sees half a shard. Same samples, same bytes."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)
    partial.rename(path)


def read(path: Path) -> Iterator[Document]:
    """Documents of one shard. Errors: ValueError that names the shard, and the sample where it is known."""
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} does not exist")
    for sample in samples(path):
        yield document_of(sample, path)


def samples(path: Path) -> Iterator[dict[str, bytes | str]]:
    """Webdataset samples of one tar, undecoded. Errors: ValueError that names a shard that is damaged."""
    whole = 0
    try:
        with path.open("rb") as stream:
            if not _ends_as_tar(stream):
                raise ValueError("the two empty blocks that end a tar are missing")
            files = tar_file_expander([{"url": str(path), "stream": stream}])
            for sample in group_by_keys(files):
                yield sample
                whole += 1
    except (ValueError, OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"shard {path} is truncated or no tar, after {whole} whole samples: {error}. "
                         "Write it again, or remove it") from error


def _ends_as_tar(stream: BinaryIO) -> bool:
    """tarfile takes a tar cut between two members for a whole one."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 1024))
    tail = stream.read()
    stream.seek(0)
    return len(tail) == 1024 and not any(tail)


def find(folder: Path, prefix: str = "") -> list[Path]:
    """The shards of a folder, sorted. Errors: FileNotFoundError for a missing or empty folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name one that holds {prefix or '*'}-000000.tar, …")
    paths = sorted(folder.glob(f"{prefix}*.tar"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no shard named {prefix}*.tar")
    return paths


def read_all(paths: Iterable[Path]) -> Iterator[Document]:
    for path in paths:
        yield from read(path)
