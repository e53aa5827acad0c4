"""Everything that a run folder of the quick start is measured by, and the examples its report shows.

Scenes have ground truth: descriptions, answers and drawings are scored by programs. Pictures of one's own have captions: what
is left is reconstruction, likelihood by modality, and retrieval of the right caption or picture among others.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data import shards
from data.images import load_image, to_array, to_png, to_tensor, to_uint8
from data.scenes.detector import detect, scene_matches
from data.scenes.image import render
from data.scenes.world import SPLITS, World
from mmllm.evaluate.generation import generation
from mmllm.evaluate.likelihood import log_likelihood
from mmllm.evaluate.understanding import understanding
from mmllm.generate.engine import Engine
from mmllm.generate.sample import Sampling
from tokenizer import metrics
from tokenizer.model import VisualTokenizer
from tokenizer.quantize import SharedIndexQuantizer
from tokenizer.semantic import Teacher, recall_at_1

HELD = tuple(split for split in SPLITS if split != "train")
DRAWING = Sampling(temperature=0.3)
"""On pictures this simple a low temperature is best."""
CANDIDATES = 16
"""Captions or pictures among which the right one is to be found."""
SHOWN = 12

Pictures = NDArray[np.uint8]


def png(picture: Pictures) -> str:
    return base64.b64encode(to_png(picture)).decode()


def tokenizer_scores(visual: VisualTokenizer, pictures: Pictures) -> tuple[dict[str, Any], Pictures]:
    """pictures [n, H, W, 3] → PSNR over all pixels, usage and perplexity (the plain keys are means over books), as `tokenizer.metrics`
    defines them, and what comes back [n, H, W, 3]."""
    counts = torch.zeros(visual.num_books, visual.codebook_size, dtype=torch.long)
    errors, back = list[Tensor](), list[Pictures]()
    for first in range(0, len(pictures), 256):
        part = pictures[first:first + 256]
        codes = visual.encode(to_tensor(part))
        counts += metrics.code_counts(codes, visual.codebook_size)
        back.append(to_uint8(visual.decode(codes)))
        errors.append(metrics.squared_error(*(torch.from_numpy(x).movedim(-1, 1) for x in (part, back[-1]))))
    return {"psnr": metrics.psnr(torch.cat(errors).mean().item()), **metrics.code_use(counts)}, np.concatenate(back)


def code_names(visual: VisualTokenizer, engine: Engine, codes: NDArray[np.int32]) -> list[str]:
    """What the codes of one picture [M, h, w] mean in words: a line a position, books apart by a bar."""
    name = engine.folder.text.processor.id_to_piece
    quantizer = visual.quantizer
    words = [quantizer.words(book) if isinstance(quantizer, SharedIndexQuantizer) else None for book in range(visual.num_books)]
    if any(of_book is None for of_book in words):
        return []
    return [" | ".join(" ".join(name(int(i)).lstrip("▁") for i in words[book][int(codes[book, y, x])])  # pyright: ignore[reportOptionalSubscript]
                       for book in range(visual.num_books))
            for y in range(codes.shape[1]) for x in range(codes.shape[2])]


def evaluate_scenes(out: Path, level: int, count: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """→ scores and examples of a run on scenes. `count`: prompts a skill and split, pictures a split (twice that for the tokenizer)."""
    world, engine = World.at_level(level), Engine.load(out / "sft" / "hf")
    visual = engine.visual
    tokenizer: dict[str, Any] = {}
    exact: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for split in HELD:
        scenes = [world.scene(seed + 2, index, split) for index in range(2 * count)]
        pictures = np.stack([render(scene) for scene in scenes])
        scores, back = tokenizer_scores(visual, pictures)
        exact[split] = float(np.mean([scene_matches(scene, detect(picture, world))
                                      for scene, picture in zip(scenes, back, strict=True)]))
        if split == "seen":
            tokenizer = scores
        rows += [{"split": split, "original": png(a), "reconstruction": png(b),
                  "codes": code_names(visual, engine, visual.encode(to_tensor(a[None])).numpy()[0])}
                 for a, b in zip(pictures[:4], back[:4], strict=True)]
    tokenizer |= {"scene_exact": exact["seen"], "scene_exact_by_split": exact}
    understood, seen = understanding(engine, world, HELD, count, seed)
    generated, drawn = generation(engine, world, HELD, count, seed, DRAWING)
    shown = [d for split in HELD for skill in generated[split] if skill != "overall"
             for d in [d for d in drawn if (d.split, d.skill) == (split, skill)][:7]]
    examples = {
        "reconstructions": rows,
        "drawings": [{"split": d.split, "skill": d.skill, "prompt": d.prompt, "right": d.right, "picture": png(d.picture)}
                     for d in shown],
        "descriptions": [{"split": s.split, "picture": png(s.picture), "description": s.description, "right": s.right,
                          "answers": [{"question": q.question, "expected": q.answer, "answer": a} for q, a in s.answers]}
                         for split in HELD for s in [s for s in seen if s.split == split][:SHOWN]]}
    return {"tokenizer": tokenizer, "understanding": understood, "generation": generated}, examples


def evaluate_pictures(out: Path, count: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """→ scores and examples of a run on pictures with captions, measured on those held out."""
    engine = Engine.load(out / "sft" / "hf")
    documents = list(shards.read_all(shards.find(out / "raw", "seen-")))[:count]
    pictures = np.stack([to_array(load_image(part)) for d in documents for part in d.parts if isinstance(part, bytes)])
    captions = [part for d in documents for part in d.parts if isinstance(part, str)]
    tokenizer, back = tokenizer_scores(engine.visual, pictures)
    codes = engine.codes(to_tensor(pictures))
    few = min(CANDIDATES, len(captions))
    order = np.random.default_rng(seed)
    others = [order.permutation([j for j in range(len(captions)) if captions[j] != captions[i]])[:few - 1]
              for i in range(len(captions))]
    sets = [[i, *map(int, some)] for i, some in enumerate(others)]
    loss = log_likelihood(engine, codes, captions, [(i, i) for i in range(len(captions))])
    to_text = log_likelihood(engine, codes, captions, [(i, j) for i, some in enumerate(sets) for j in some])["text"]
    found = _first_best(to_text, sets)
    drawn = engine.draw(captions, sampling=Sampling(temperature=0.8), seed=seed)[:, 0]
    made = to_uint8(engine.pictures(drawn))
    teacher = Teacher.load(out / "teacher.safetensors")
    with torch.no_grad():
        words = teacher.text_embedding(teacher.text_batch([engine.folder.text.encode(c) for c in captions]))
        images, real = (teacher.image_embedding(to_tensor(p)) for p in (made, pictures))
    descriptions = engine.describe(codes)
    scores = {
        "tokenizer": tokenizer,
        "understanding": {"loss_text": -loss["text_mean"].mean().item(), f"caption_among_{few}": found, "chance": 1 / few},
        "generation": {"loss_image": -loss["image_mean"].mean().item(),
                       "clip_score": F.cosine_similarity(words, images).mean().item(),
                       "clip_score_of_real": F.cosine_similarity(words, real).mean().item(),
                       "clip_recall_at_1": recall_at_1(images, words), "clip_recall_at_1_of_real": recall_at_1(real, words)}}
    examples = {
        "reconstructions": [{"split": "held out", "original": png(a), "reconstruction": png(b), "codes": []}
                            for a, b in zip(pictures[:24], back[:24], strict=True)],
        "drawings": [{"split": "held out", "skill": "caption", "prompt": c, "right": None, "picture": png(p)}
                     for c, p in zip(captions[:24], made[:24], strict=True)],
        "descriptions": [{"split": "held out", "picture": png(p), "description": d, "right": None,
                          "answers": [{"question": "caption", "expected": c, "answer": d}]}
                         for p, d, c in zip(pictures[:24], descriptions[:24], captions[:24], strict=True)]}
    return scores, examples


def _first_best(values: Tensor, sets: list[list[int]]) -> float:
    """Share of sets whose first member scores highest; `values` lie set after set."""
    parts = values.split([len(some) for some in sets])
    return float(np.mean([int(part.argmax()) == 0 for part in parts]))
