"""A visual tokenizer measured on pictures of any source: eval.json for programs, eval.html to look at.

Both sides of every comparison are one uint8 crop, the one that encoding sees (`data.images.fitted`). What has no weights is not
measured, and the report says so.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data.images import fitted, to_array, to_uint8
from data.pictures import count, pictures
from mmllm.evaluate import report, visual_page
from mmllm.evaluate.settings import VisualEvaluation
from mmllm.evaluate.visual_tally import GRID, Pictures, Sample, Tally, encode, scales_of
from mmllm.run import write_json
from tokenizer import features
from tokenizer.features import Extractor
from tokenizer.legibility import Legibility, Read, legibility, tesseract
from tokenizer.model import VisualTokenizer
from tokenizer.perceptual import Perceptual


def evaluate_visual(model_folder: Path, source: Path, out: Path, settings: VisualEvaluation | None = None,
                    progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Measure a tokenizer on a folder of pictures, img2dataset tars or raw shards; write out/eval.json and out/eval.html. → the record

    Errors: FileNotFoundError and ValueError for weights, source and settings, before anything is computed."""
    settings, start = settings or VisualEvaluation(), time.perf_counter()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text = Legibility(font=settings.font, seed=settings.seed)
    judges, perceptual, digests = list[Extractor](), None, dict[str, str]()
    if settings.inception is not None:
        judges.append(features.inception(settings.inception, device))
    if settings.clip_name is not None and settings.clip_weights is not None:
        judges.append(features.clip(settings.clip_name, settings.clip_weights, device))
    if settings.lpips is not None:
        what = f"torchvision's state dict of {settings.lpips_backbone}"
        digests["lpips"] = features.opened(settings.lpips, "LPIPS weights", "--lpips", what)
        perceptual = Perceptual.load(settings.lpips_backbone, settings.lpips).to(device)
    there = count(source, settings.prefix)
    total = min(there, settings.limit or there)
    visual = VisualTokenizer.load(model_folder).to(device)
    judges.append(features.teacher(visual.features))
    unread = list[str]()
    if (model_folder / features.HEAD).is_file():
        try:
            judges.append(features.codes(visual, model_folder, device))
        except (FileNotFoundError, ValueError) as error:  # a pretrained text tower may have stayed where it was trained
            unread.append(f"codes, by the tokenizer's own head: not measured, {error}")
    tally = Tally(visual=visual, judges=judges, perceptual=perceptual, seed=settings.seed, device=device)
    neighbours = visual.quantizer.neighbours(min(max(delta for _, delta in GRID), visual.codebook_size - 1))
    skipped = list[dict[str, str]]()
    for batch in _batches(source, (total, there), visual.image_size, settings, skipped):
        tally.add(batch, neighbours)
        progress(tally.count + len(skipped), total)
    if tally.count < 2:
        first = f", the first because: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"{source}: {tally.count} pictures of 2 or more to measure; {len(skipped)} were refused{first}")
    scores, missing, notes = tally.scores()
    reads = _read(tally, text, scores, missing)
    record = {
        "commit": report.commit(), "machine": report.machine(), "seconds": round(time.perf_counter() - start, 1),
        "model": {"folder": str(model_folder), "fingerprint": visual.fingerprint, "image_size": visual.image_size,
                  "num_books": visual.num_books, "codebook_size": visual.codebook_size, "scales": list(scales_of(visual))},
        "source": {"path": str(source), "pictures": tally.count, "skipped": skipped}, "settings": vars(settings),
        "weights": digests | {judge.name: judge.weights for judge in judges if judge.weights},
        "scores": scores, "not_measured": missing, "notes": notes + unread}
    write_json(out / "eval.json", record)
    (out / "eval.html").write_text("".join(visual_page.page(record, tally, reads)))
    return record


def _batches(source: Path, share: tuple[int, int], side: int, settings: VisualEvaluation,
             skipped: list[dict[str, str]]) -> Iterator[list[Sample]]:
    """So many of so many pictures, evenly spread, decoded and fitted; what is refused is named in `skipped`."""
    batch, (some, whole) = list[Sample](), share
    for number, picture in enumerate(pictures(source, settings.prefix, settings.label)):
        if (number + 1) * some // whole == number * some // whole:
            continue
        try:
            batch.append(Sample(picture.name, to_array(fitted(picture.file, side)), picture.label))
        except ValueError as error:
            skipped.append({"name": picture.name, "reason": str(error)})
        if len(batch) == settings.batch:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(tally: Tally, text: Legibility, scores: dict[str, Any], missing: dict[str, str]) -> list[Read]:
    """Words before and after the tokenizer, into `scores` under "legibility"; what was read, to be shown."""
    if (read := tesseract()) is None:
        missing["legibility"] = "tesseract not found (apt-get install tesseract-ocr, pip install pytesseract)"
        return []

    @torch.no_grad()
    def rebuild(originals: Pictures) -> Pictures:
        return to_uint8(tally.visual.decode(encode(tally.visual, originals, tally.finest, tally.device), tally.finest))

    try:
        scores["legibility"], reads = legibility(text, tally.visual.image_size, tally.grounds, rebuild, read)
    except ValueError as error:  # the pictures are too small for any text
        missing["legibility"] = str(error)
        return []
    return reads
