"""Drawing and describing with our engine beside Hugging Face `generate` on the same weights, and what its options gain.

    OMP_NUM_THREADS=1 python tools/bench/generate.py MODEL [--guidance 2] [--repeats 7] [--prompts 60] [--level 1]
    python tools/bench/generate.py MODEL --attention

MODEL is a tuned folder of the quick start. Hugging Face runs with its own guidance processor and our grammar as a logits processor; both
take turns, and a ratio is the median of the turns' ratios, by the clock and in CPU seconds (which count what a busy machine takes away
less). Scores are pictures that the detector finds right, with paired bootstrap intervals of 95 %.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.images import to_uint8
from data.scenes.detector import detect
from data.scenes.tasks import SKILLS, prompts, score
from data.scenes.world import World
from mmllm.generate.batching import run
from mmllm.generate.best import agreement
from mmllm.generate.decoder import Decoder
from mmllm.generate.engine import Engine
from mmllm.generate.grammar import Processor
from mmllm.generate.plan import Plan
from mmllm.generate.request import Request
from mmllm.generate.sample import Sampling
from mmllm.generate.speculate import Speculation, draw_ahead

IMAGE = Sampling(temperature=0.3)


def stock(engine: Engine) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error
    disable_progress_bar()
    set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(engine.folder.path).eval()


def ratios(theirs: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> dict[str, float]:
    """How many times as fast ours is."""
    spent: list[list[tuple[float, float]]] = [[], []]
    for turn in range(repeats + 1):
        for place, work in enumerate((theirs, ours)):
            clock, cpu = time.perf_counter(), time.process_time()
            work()
            if turn:  # the first warms up
                spent[place].append((time.perf_counter() - clock, time.process_time() - cpu))
    return {name: round(median(a[i] / b[i] for a, b in zip(*spent, strict=True)), 2) for i, name in enumerate(("clock", "cpu"))}


def drawing(engine: Engine, model: Any, batch: int, guidance: float, repeats: int) -> dict[str, float]:
    vocab = engine.folder.vocab
    asked = engine.draw_requests("a red circle above a blue star", batch, Plan(image=IMAGE, guidance=guidance, only_picture=True))
    ids = torch.tensor([list(one.prompt) for one in asked])
    blank = torch.tensor([[vocab.bos, *asked[0].prompt[-2:]]] * batch)
    most = vocab.num_books * vocab.grids[0][0] * vocab.grids[0][1]
    rules = [Processor(engine.grammar, 10**6)]

    @torch.inference_mode()
    def theirs() -> None:
        guided = {} if guidance == 1 else {"guidance_scale": guidance, "negative_prompt_ids": blank,
                                           "negative_prompt_attention_mask": torch.ones_like(blank)}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=True, temperature=IMAGE.temperature,
                             top_k=0, logits_processor=rules, **guided)
        for row in out[:, ids.shape[1]:]:
            vocab.codes(row.tolist(), *vocab.grids[0])

    return ratios(theirs, lambda: engine.decode(asked), repeats)


def describing(engine: Engine, model: Any, repeats: int) -> dict[str, float]:
    """A fixed number of text tokens, greedy: both say the same."""
    vocab = engine.folder.vocab
    prompt = [vocab.bos, vocab.user, *engine.folder.text.encode("what do you see?"), vocab.assistant]
    count = 48
    grammar = replace(engine.grammar, text=engine.grammar.text.clone())
    grammar.text[[vocab.eos, vocab.user, vocab.boi]] = False  # it goes on
    ids, rules, said = torch.tensor([prompt]), [Processor(grammar, 10**6)], [list[int](), list[int]()]

    @torch.inference_mode()
    def theirs() -> None:
        said[0] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                                 logits_processor=rules)[0, len(prompt):].tolist()

    def ours() -> None:
        said[1] = run(engine.decoder, grammar, [Request(prompt=prompt, key=0, plan=Plan(max_text=count))])[0]

    found = ratios(theirs, ours, repeats)
    assert said[0] == said[1], "the two say different things"
    return found


def right(engine: Engine, world: World, asked: list[Any], codes: list[NDArray[np.int32]]) -> NDArray[np.float64]:
    pictures = to_uint8(engine.pictures(np.stack(codes)))
    return np.array([float(score(prompt, detect(picture, world))) for prompt, picture in zip(asked, pictures, strict=True)])


def interval(values: NDArray[np.float64], resamples: int = 2000) -> list[float]:
    """[mean, low, high] of 95 %."""
    random = np.random.default_rng(0)
    means = values[random.integers(0, len(values), (resamples, len(values)))].mean(1)
    return [round(float(x), 3) for x in (values.mean(), *np.quantile(means, (0.025, 0.975)))]


def scored(engine: Engine, world: World, count: int, guidance: float, temperature: float) -> dict[str, Any]:
    """Right pictures: one by one, decoded ahead exactly and relaxed, and the best of four by the model's own judgement."""
    asked = [prompt for skill in SKILLS for prompt in prompts(world, skill, "seen", count, 0)]
    plan = Plan(image=Sampling(temperature=temperature), guidance=guidance, only_picture=True)
    four = [engine.draw_requests(prompt.text, 4, plan, 0) for prompt in asked]
    flat = [one for some in four for one in some]
    codes = [engine.picture_of(one, ids) for one, ids in zip(flat, engine.decode(flat), strict=True)]
    grouped = np.stack(codes).reshape(len(asked), 4, *codes[0].shape)
    plain = np.stack([right(engine, world, asked, list(grouped[:, i])) for i in range(4)])  # [4, prompts]
    out: dict[str, Any] = {"prompts": len(asked), "temperature": temperature, "one by one": interval(plain.mean(0)),
                           "any of 4 right": interval(plain.max(0))}
    for judge in ("picture", "caption"):
        best = agreement(engine, [prompt.text for prompt in asked], grouped, judge).argmax(1)
        chosen = plain[best, np.arange(len(asked))]
        out[f"best of 4 by {judge}"] = {"score": interval(chosen), "gain": interval(chosen - plain.mean(0))}
    one_by_one = len(codes[0].flatten())
    for delta in (0.0, 0.02, 0.2):
        name, how = f"ahead, delta {delta}", Speculation(delta=delta)
        groups = how.groups_of(engine.visual) if how.delta else None
        drawn = [draw_ahead(engine.decoder, engine.grammar, flat[first:first + 256], how, groups) for first in range(0, len(flat), 256)]
        ahead = [engine.picture_of(one, ids) for one, ids in zip(flat, (ids for part in drawn for ids in part.ids), strict=True)]
        found = right(engine, world, [prompt for prompt in asked for _ in range(4)], ahead).reshape(-1, 4).mean(1)
        out[name] = {"score": interval(found), "score less one by one": interval(found - plain.mean(0)),
                     "fewer passes": round(one_by_one * len(flat) / sum(part.looked for part in drawn), 2)}
    return out


def attention(threads: int) -> dict[str, float]:
    """How many times as fast as torch's, on so many threads, the compiled attention is; by the multiplications of its scores."""
    from mmllm.generate.attend import attend

    @torch.inference_mode()
    def gain(b: int, s: int, columns: int, heads: int, k: int) -> float:
        norms = torch.ones(2 * heads, k)
        decoder = Decoder(norms, (), norms, norms, heads, heads, k, 1e-6, torch.ones(k // 2), 1.0)
        cache = decoder.room(b, columns)
        cache.store = torch.randn(1, 2, b, heads, columns, k)
        joined, start = torch.randn(b, s, 3 * heads, k), np.maximum(columns - s - np.arange(b), 0)
        place = decoder._place(cache, 0, start, b, s)
        many = range(1 + 10**7 // (b * s * columns * heads * k))
        return ratios(lambda: [decoder._attend(joined, norms, cache.store[0], place) for _ in many],
                      lambda: [attend(joined, norms, cache, 0, 0, start, 1.0, 1e-6) for _ in many], 5)["clock"]

    torch.set_num_threads(threads)
    return {f"2^{np.log2(np.prod(shape)):.0f}: {shape[0]} rows of {shape[1]} tokens on {shape[2]}, {shape[3]} heads of {shape[4]}":
            gain(*shape) for shape in ((1, 1, 64, 4, 32), (1, 1, 512, 4, 32), (16, 1, 64, 4, 32), (1, 16, 64, 4, 32), (1, 1, 64, 32, 128),
                                       (64, 1, 64, 4, 32), (1, 64, 64, 4, 32), (16, 1, 64, 32, 128), (1, 64, 64, 32, 128))}


def memory(path: Path) -> dict[str, float]:
    """Bytes of the weights, as multiples of int8."""
    sizes = {name: Engine.load(path, "cpu", dtype, int8).decoder.nbytes
             for name, dtype, int8 in (("fp32", torch.float32, False), ("bf16", torch.bfloat16, False), ("int8", torch.float32, True))}
    return {name: round(size / sizes["int8"], 2) for name, size in sizes.items()}


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--attention", action="store_true", help="of the decoder alone: its two ways of attention, and nothing else")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=60, help="of each skill")
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.3)
    options = parser.parse_args()
    report: dict[str, Any]
    if options.attention:
        report = {f"{threads} threads": attention(threads) for threads in (1, 2)}
        print(json.dumps(report, indent=1))
        return report
    torch.set_num_threads(1)
    engine = Engine.load(options.model, "cpu")
    model = stock(engine)
    report = {
        "images/s over Hugging Face": {f"batch {batch}, guidance {guidance}": drawing(engine, model, batch, guidance, options.repeats)
                                       for batch in (1, 8) for guidance in (options.guidance, 1.0)},
        "text tokens/s over Hugging Face": describing(engine, model, options.repeats),
        "weights over int8": memory(options.model),
        "pictures right": scored(engine, World.at_level(options.level), options.prompts, 1.0, options.temperature),
        "load": [round(x, 1) for x in os.getloadavg()], "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
