"""Memory and time of `mmllm import` and `mmllm export` on a Hugging Face folder of random weights.

    python tools/bench/warm_start.py [--layers 14] [--work FOLDER]

Each command runs in a process of its own. Printed is the peak of its resident memory over what it held with everything imported and the
visual tokenizer loaded once, beside the model's bytes and its largest tensor's.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mmllm import streams
from mmllm.config import Model
from mmllm.hf_config import model_config
from mmllm.streams import Lazy
from mmllm.weights import shapes
from tokenizer.model import TokenizerConfig, VisualTokenizer
from tokenizer.quantize import QuantizerConfig
from tokenizer.semantic import TowerConfig

ROWS = 32_000


def make_base(folder: Path, layers: int) -> int:
    """A Llama of random bf16 weights in files of 100 MB, with a tokenizer of bytes. → bytes of the weights"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    model = Model(num_layers=layers, hidden_size=1024, num_attention_heads=16, num_query_groups=4, ffn_hidden_size=4096, qk_layernorm=False)
    folder.mkdir(parents=True)
    tensors = {name: Lazy(shape, torch.bfloat16, partial(torch.randn, shape, dtype=torch.bfloat16))
               for name, shape in shapes(model, ROWS).items()}
    streams.write(folder, tensors, 100_000_000)
    (folder / "config.json").write_text(json.dumps(model_config(model, ROWS, 4096)))
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.save(str(folder / "tokenizer.json"))
    return sum(tensor.bytes for tensor in tensors.values())


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the highest (proc(5))."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(what: str, base: Path, start: Path, visual: Path, out: Path) -> None:
    """One command; prints a line of JSON."""
    import_module("torch.distributed.checkpoint")
    from mmllm.adopt import adopt
    from mmllm.export import export
    VisualTokenizer.load(visual)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far counts from here
    before, began = memory("VmRSS"), time.perf_counter()
    if what == "import":
        adopt(base, start, visual)
    else:
        export(start, out, None, None, visual)
    print(json.dumps({"before": before, "peak": memory("VmHWM"), "seconds": time.perf_counter() - began}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14, help="of 33 MB each")
    parser.add_argument("--work", type=Path, help="an empty folder with room for three times the model; a temporary one if absent")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], *map(Path, options.measure[1:]))
        return
    with TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        tower = TowerConfig(image_size=24, patch_size=8, width=16, layers=1, heads=2, text_layers=1, embed_dim=8)
        VisualTokenizer(TokenizerConfig(tower=tower, pixel="linear", channels=8, blocks=1, quantizer=QuantizerConfig(
            codebook_size=8192, semantic_table="free"))).save(folder / "visual")
        size = make_base(folder / "base", options.layers)
        print(f"weights {size / 1e6:,.0f} MB, largest tensor {ROWS * 1024 * 2 / 1e6:,.0f} MB (bf16; twice as fp32)")
        paths = [str(folder / each) for each in ("base", "start", "visual", "hf")]
        for what in ("import", "export"):
            said = subprocess.run([sys.executable, __file__, "--measure", what, *paths], check=True, capture_output=True, text=True)
            found = json.loads(said.stdout.splitlines()[-1])
            print(f"{what}: {(found['peak'] - found['before']) / 1e6:,.0f} MB above the {found['before'] / 1e6:,.0f} MB it began with, "
                  f"{found['seconds']:.1f} s")
        before, after = (streams.read(folder / each) for each in ("base", "hf"))
        same = all(torch.equal((old := before[each].make()), after[each].make()[:len(old)]) for each in before)
        print(f"every weight comes back bit for bit: {same}")


if __name__ == "__main__":
    main()
