"""The Hugging Face folder of a model: what `AutoModelForCausalLM` and `AutoTokenizer` open, and what our engine adds.

    config.json, generation_config.json, model*.safetensors    a stock Qwen3 or Llama, vocabulary unpadded
    tokenizer.json, tokenizer_config.json                      text pieces, control tokens and image codes in one
    vocab.json, text.model, visual_tokenizer/, mmllm.json      ours: id ranges, text model, pictures, fingerprints

Two tokenizers must give one and the same ids: SentencePiece (`text.model`, what the model was trained with) and the
fast tokenizer built from its pieces. A folder is written beside its place and renamed: nobody reads half of one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.vocab import Vocab
from mmllm.config import Model
from tokenizer.text import TextTokenizer

FORMAT = 1
SHARD_BYTES = 5_000_000_000
OURS = ("mmllm.json", "config.json", "vocab.json", "text.model", "tokenizer.json", "visual_tokenizer")

# A message is {"role", "content"}; content is a string or parts {"text"}. A picture is written as its tokens.
CHAT_TEMPLATE = """\
{{ bos_token }}\
{%- for message in messages -%}\
{%- if message.role not in ("user", "assistant") -%}{{ raise_exception("roles are user and assistant") }}{%- endif -%}\
{{ "<user>" if message.role == "user" else "<assistant>" }}\
{%- if message.content is string -%}{{ message.content }}\
{%- else -%}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}{%- endif -%}\
{%- endfor -%}\
{{ "<assistant>" if add_generation_prompt else eos_token }}"""


@dataclass(frozen=True)
class Folder:
    """An opened model folder; weights are read when asked for."""

    path: Path
    config: dict[str, Any]
    vocab: Vocab
    text: TextTokenizer
    chat: bool
    """Tuned on conversations: prompts are turns. Otherwise they are plain documents."""

    @property
    def visual_tokenizer(self) -> Path:
        return self.path / "visual_tokenizer"

    @property
    def max_len(self) -> int:
        return int(self.config["max_position_embeddings"])

    def tensors(self) -> dict[str, Tensor]:
        """All weights by Hugging Face name."""
        tensors: dict[str, Tensor] = {}
        for path in _weight_files(self.path):
            try:
                with safe_open(path, "pt") as file:
                    tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            except OSError:
                raise
            except Exception as error:  # safetensors raises a class of its own
                raise ValueError(f"{path} is no whole safetensors file ({error}): export the model again") from error
        rows = tensors["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in tensors else 0
        if rows != self.vocab.size:
            raise ValueError(f"{self.path}: the weights embed {rows:,} tokens, vocab.json has {self.vocab.size:,}")
        return tensors


def open_folder(path: Path) -> Folder:
    """Check a model folder and open all but its weights. Errors: FileNotFoundError, ValueError; one line each."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no model folder {path}")
    if not (path / "mmllm.json").is_file():
        found = "it has a config.json but no mmllm.json: " if (path / "config.json").is_file() else ""
        raise ValueError(f"{path} is not a model folder: {found}give one that `mmllm export` or a tuning run wrote")
    for name in OURS:
        if not (path / name).exists():
            raise FileNotFoundError(f"model folder {path} has no {name}: export it again")
    _weight_files(path)
    ours, config = _json(path / "mmllm.json"), _json(path / "config.json")
    if ours.get("format") != FORMAT:
        raise ValueError(f"{path}/mmllm.json has format {ours.get('format')}, this version reads {FORMAT}")
    text, vocab = TextTokenizer.load(path / "text.model"), Vocab.load(path / "vocab.json")
    for name, now in (("text.model", text.fingerprint), ("visual_tokenizer", fingerprint(path / "visual_tokenizer"))):
        if ours["fingerprints"][name] != now:
            raise ValueError(f"{path}/{name} has fingerprint {now}, the model was trained with "
                             f"{ours['fingerprints'][name]}: put the right one back or export again")
    if text.size != vocab.text_size:
        raise ValueError(f"{path}: text.model has {text.size:,} pieces, vocab.json says {vocab.text_size:,}")
    if config["vocab_size"] != vocab.size:
        raise ValueError(f"{path}: config.json has vocab_size {config['vocab_size']:,}, vocab.json has {vocab.size:,}")
    return Folder(path, config, vocab, text, bool(ours["chat"]))


def write_folder(out: Path, tensors: Mapping[str, Tensor], model: Model, vocab: Vocab, text_model: Path,
                 visual_tokenizer: Path, chat: bool, max_len: int = 32_768) -> None:
    """Write a model folder whole or not at all. tensors: Hugging Face names, vocabulary without padding rows."""
    text = TextTokenizer.load(text_model)
    if text.size != vocab.text_size:
        raise ValueError(f"{text_model} has {text.size:,} pieces, the vocabulary {vocab.text_size:,}")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors and tensors[name].shape[0] != vocab.size:
            raise ValueError(f"{name} has {tensors[name].shape[0]:,} rows, the vocabulary {vocab.size:,} tokens: "
                             "drop the padding rows")
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    ends = {"bos_token_id": vocab.bos, "eos_token_id": vocab.eos, "pad_token_id": vocab.pad}
    with replaced(out) as folder:
        _dump(folder / "config.json", {**model_config(model, vocab.size, max_len), **ends, "dtype": dtype})
        # a user's turn ends an answer too: pretraining documents ask on
        _dump(folder / "generation_config.json", {**ends, "eos_token_id": [vocab.eos, vocab.user]})
        _write_tensors(folder, tensors)
        write_tokenizer(folder, text, vocab, chat)
        vocab.save(folder / "vocab.json")
        text.save(folder / "text.model")
        shutil.copytree(visual_tokenizer, folder / "visual_tokenizer")
        _dump(folder / "mmllm.json", {"format": FORMAT, "chat": chat, "fingerprints": {
            "text.model": text.fingerprint, "visual_tokenizer": fingerprint(folder / "visual_tokenizer")}})


def model_config(model: Model, vocab_size: int, max_len: int) -> dict[str, Any]:
    """config.json of the stock architecture with this shape."""
    kind, name = ("qwen3", "Qwen3ForCausalLM") if model.qk_layernorm else ("llama", "LlamaForCausalLM")
    return {
        "architectures": [name], "model_type": kind, "vocab_size": vocab_size, "max_position_embeddings": max_len,
        "num_hidden_layers": model.num_layers, "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size, "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.groups, "head_dim": model.head_width, "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps, "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False, "attention_dropout": 0.0, "use_cache": True,
        "rope_theta": model.rotary_base,  # transformers 4, vLLM
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},  # transformers 5
    }


def read_model(config: Mapping[str, Any]) -> Model:
    """The shape that a config.json describes; inverse of `model_config`."""
    return Model(num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
                 num_attention_heads=config["num_attention_heads"], num_query_groups=config["num_key_value_heads"],
                 ffn_hidden_size=config["intermediate_size"], head_dim=config.get("head_dim"),
                 qk_layernorm=config["model_type"] == "qwen3", norm_eps=config["rms_norm_eps"],
                 rotary_base=config["rope_parameters"]["rope_theta"], init_std=config["initializer_range"],
                 tie_embeddings=config["tie_word_embeddings"])


def write_tokenizer(folder: Path, text: TextTokenizer, vocab: Vocab, chat: bool) -> None:
    """tokenizer.json and its configuration: text pieces keep their ids, control tokens and codes are added behind them.

    Equal to SentencePiece under its settings in `tokenizer.text`: no whitespace is squeezed, every stretch of text
    between special tokens starts with the space that SentencePiece puts there, nothing is split before the merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = {text.processor.id_to_piece(i): i for i in range(text.size)}
    # SentencePiece joins whichever two neighbours make the piece of lowest id: every way to make each piece, in that order
    merges = [(piece[:cut], piece[cut:]) for piece in pieces if not text.processor.is_byte(pieces[piece])
              for cut in range(1, len(piece)) if piece[:cut] in pieces and piece[cut:] in pieces]
    fast = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    fast.add_tokens([AddedToken(vocab.token_name(i), special=True, normalized=False)
                     for i in range(vocab.text_size, vocab.size)])
    fast.save(str(folder / "tokenizer.json"))
    _dump(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "padding_side": "left",
        **({"chat_template": CHAT_TEMPLATE} if chat else {})})


def fingerprint(folder: Path) -> str:
    """`VisualTokenizer.fingerprint` of a saved one, without building it: SHA-256 of configuration and weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"visual tokenizer {folder} has no {name}")
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def check_target(out: Path) -> None:
    """Refuse to write over something that is no model folder."""
    if out.exists() and not (out / "mmllm.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a model folder: give another place, nothing was written")


@contextmanager
def replaced(out: Path) -> Generator[Path]:
    """A new folder to fill; it takes the place of `out` when the block ends well, and is gone when it does not."""
    check_target(out)
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in (p for p in partial.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file, or several with an index where they exceed what others can hold in memory at once."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    total = sum(t.nbytes for shard in shards for t in shard.values())
    _dump(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard}})


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model folder {folder} has no {name}: export it again")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
