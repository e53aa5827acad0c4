"""Pictures with captions, as people have them → raw shards.

    a folder     x.png (jpg, jpeg, webp) with x.txt beside it
    tar shards   KEY.jpg + KEY.txt (or KEY.json with "caption"), as img2dataset writes them

A picture that does not decode or is refused, a caption without a picture and a picture without a caption are skipped and counted
by cause, and the run stops where more than `max_bad` of the samples are bad.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from data import shards
from data.document import Document
from data.images import MAX_PIXELS, Limits, fitted, to_array, to_png
from data.skipped import Skipped

PICTURES = ("png", "jpg", "jpeg", "webp")


def pairs(source: Path) -> Iterator[tuple[str, bytes | None, str | None]]:
    """(name, picture file, caption) of everything in a folder of files or of tars; what is missing is None."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name a folder of pictures with captions, or of tar shards")
    tars = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar"))
    if tars:
        for tar in tars:
            for sample in shards.samples(tar):
                picture = next((sample[e] for e in PICTURES if e in sample), None)
                yield f"{tar.name}/{sample['__key__']}", _bytes(picture), _caption(sample)
        return
    stems: dict[Path, dict[str, Path]] = {}
    for path in sorted(source.rglob("*")):
        extension = path.suffix[1:].lower()
        if path.is_file() and extension in (*PICTURES, "txt"):
            stems.setdefault(path.with_suffix(""), {})["text" if extension == "txt" else "picture"] = path
    if not stems:
        raise FileNotFoundError(f"{source} holds no picture ({', '.join(PICTURES)}), no caption (txt) and no tar shard")
    for stem, found in stems.items():
        yield (str(stem.relative_to(source)), found["picture"].read_bytes() if "picture" in found else None,
               found["text"].read_text(errors="replace").strip() if "text" in found else None)


def _bytes(value: bytes | str | None) -> bytes | None:
    return value if isinstance(value, bytes) else None


def _caption(sample: dict[str, bytes | str]) -> str | None:
    if isinstance(text := sample.get("txt"), bytes):
        return text.decode(errors="replace").strip()
    if isinstance(record := sample.get("json"), bytes):
        try:
            caption = json.loads(record).get("caption")
        except (ValueError, AttributeError):
            return None
        return caption.strip() if isinstance(caption, str) else None
    return None


def convert(source: Path, folder: Path, size: int, held: float = 0.05, max_bad: float = 0.05,
            max_pixels: int = MAX_PIXELS, shard_len: int = 2048) -> tuple[int, int, Skipped]:
    """Write `train-*.tar` and `seen-*.tar` (a share `held` of the pairs, chosen by a hash of the name) into `folder`, pictures
    fitted to size × size. → how many train, how many held, what was skipped.

    Errors: FileNotFoundError for nothing to read; ValueError past `max_bad`."""
    skipped, limits = Skipped(), Limits(max_pixels=max_pixels)
    splits: dict[str, list[Document]] = {"train": [], "seen": []}
    for name, picture, caption in pairs(source):
        if picture is None:
            skipped.add("caption without a picture", name)
        elif not caption:
            skipped.add("picture without a caption", name)
        else:
            try:
                png = to_png(to_array(fitted(picture, size, limits)))
            except ValueError as error:
                skipped.refuse(error, name)
                continue
            digest = hashlib.sha256(name.encode()).hexdigest()
            split = "seen" if int(digest[:8], 16) < held * 2**32 else "train"
            splits[split].append(Document(key=digest[:16], parts=(png, caption), meta={"name": name}))
    good, bad = sum(map(len, splits.values())), skipped.causes.total()
    if bad > max_bad * (good + bad):
        raise ValueError(f"{source}: {bad} of {good + bad} samples are bad, more than max_bad = {max_bad:.0%}: {skipped}. "
                         "Mend them or raise max_bad; nothing was written")
    if not splits["train"] or not splits["seen"]:
        raise ValueError(f"{source}: {good} good pairs are too few to train on some and hold out {held:.0%}: add pictures")
    for split, documents in splits.items():
        shards.write(documents, folder, split, shard_len)
    return len(splits["train"]), len(splits["seen"]), skipped
