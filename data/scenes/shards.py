"""Scenes → raw shards: pictures with descriptions, captions to draw from, questions with answers; some documents interleaved.

One scene in `INTERLEAVED_EVERY` begins a document of two pictures, each after its caption, read in order. The others are
pairs, to be drawn from any caption or described and asked about. Splits that are held out are pairs alone.
"""

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from data import shards
from data.document import Document
from data.images import to_png
from data.scenes.image import render
from data.scenes.tasks import questions
from data.scenes.text import captions, describe
from data.scenes.world import SPLITS, Scene, World

INTERLEAVED_EVERY = 16


def pair(scene: Scene, key: str, rng: random.Random) -> Document:
    """A picture with what can be said and asked of it."""
    return Document(key=key, parts=(to_png(render(scene)), describe(scene)),
                    captions=tuple(dict.fromkeys(text for _, text in captions(scene, rng))),
                    questions=tuple((q.question, q.answer) for q in questions(scene, rng)),
                    meta={"scene": scene.to_json()})


def sequence(scenes: list[Scene], key: str, rng: random.Random) -> Document:
    """Pictures in a row, each after a caption."""
    parts: list[str | bytes] = []
    for scene in scenes:
        parts += [rng.choice([text for _, text in captions(scene, rng)]), to_png(render(scene))]
    return Document(key=key, parts=tuple(parts), meta={"scenes": [scene.to_json() for scene in scenes]})


def documents(world: World, seed: int, split: str, first: int, count: int) -> Iterator[Document]:
    """Documents `first` … of a split; a pure function of the arguments."""
    for index in range(first, first + count):
        scene, key = world.scene(seed, index, split), f"{split}-{index:08d}"
        rng = random.Random(f"words {seed} {key}")
        if split == "train" and index % INTERLEAVED_EVERY == 0:
            yield sequence([scene, world.scene(seed, index + 1, split)], key, rng)
        else:
            yield pair(scene, key, rng)


def _write_shard(level: int, seed: int, split: str, number: int, shard_len: int, count: int, path: Path) -> None:
    first = number * shard_len
    world = World.at_level(level)
    shards.write_tar(path, (shards.sample_of(document) for document in
                            documents(world, seed, split, first, min(shard_len, count - first))))


def write(folder: Path, level: int, seed: int, train: int, held: int, shard_len: int = 2048,
          progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """`train` documents of the train split and `held` of each other one, in shards `SPLIT-000000.tar`; whole shards
    that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(level, seed, split, number, shard_len, count, folder / f"{split}-{number:06d}.tar")
            for split in SPLITS for count in [train if split == "train" else held]
            for number in range(-(-count // shard_len))]
    jobs = [job for job in jobs if not job[-1].exists()]
    with ProcessPoolExecutor(min(len(jobs) or 1, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for done, future in enumerate([pool.submit(_write_shard, *job) for job in jobs]):
            future.result()
            progress(done + 1, len(jobs))
