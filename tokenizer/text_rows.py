"""Rows of a language model's input embedding that a text-aligned table is made of.

A code that stands on the embedding of a word starts out meaning something to the language model that owns the row (TA-Tok, Han et al.
2025, arXiv:2506.18898, section 3.1: C = E W, E frozen rows, W trained). Of the model only that one tensor is read: no other weight, no
library that could run it. What is kept of it is which rows and a checksum of the tensor, so the matrix never travels with a tokenizer.

Letters: V rows of the embedding, V' usable ones, K chosen ones, D width.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

NAMES = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight",
         "language_model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "model.decoder.embed_tokens.weight",
         "gpt_neox.embed_in.weight", "model.tok_embeddings.weight", "tok_embeddings.weight", "transformer.embedding.word_embeddings.weight",
         "transformer.word_embeddings.weight", "embed_tokens.weight")
"""What Hugging Face architectures call their input embedding, the first that a folder has is read: Llama, Qwen, Mistral and Gemma; models
that see, in both orders; GPT-2; OPT; Pythia; InternLM; GLM; Falcon and BLOOM."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
ROWS = 16_384
"""Rows that are fp32 at once while a matrix is gone through: 16,384 × 4,096 is 256 MiB."""


class Embedding(NamedTuple):
    matrix: Tensor
    """[V, D] as stored"""
    name: str
    """of the tensor"""
    checksum: str
    """SHA-256 of the tensor's bytes, 16 hex digits"""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRows:
    """Rows of one embedding, by ascending id."""

    embedding: Tensor
    """[V', D] float32"""
    ids: Tensor
    """[V'] int64: token ids, which are rows of the whole embedding"""
    checksum: str
    """Of the whole embedding: 16 hex digits."""
    source: str
    """The folder read, for messages."""

    def __len__(self) -> int:
        return len(self.ids)


def read(folder: Path, quantiles: tuple[float, float] = (0.01, 0.99)) -> TextRows:
    """All usable rows of a Hugging Face folder: of tokens that its tokenizer makes from text (no special or added ones, no padding rows),
    without those of extreme length: rows that training hardly touched are among them."""
    matrix, name, checksum = read_embedding(folder)
    ids = text_ids(Path(folder))
    if int(ids[-1]) >= len(matrix):
        raise ValueError(f"{folder}: the tokenizer has ids up to {int(ids[-1]):,}, {name} has {len(matrix):,} rows: "
                         "put the model's own tokenizer beside it")
    norms = torch.cat([matrix[part].float().norm(dim=-1) for part in ids.split(ROWS)])
    low, high = torch.quantile(norms, torch.tensor(quantiles))
    ids = ids[(norms >= low) & (norms <= high)]
    return TextRows(embedding=matrix[ids].float(), ids=ids, checksum=checksum, source=str(folder))


# Files ----------------------------------------------------------------------------------------------------------------


def read_embedding(folder: Path) -> Embedding:
    """The input embedding of a Hugging Face folder and nothing else: of sharded weights only the file that holds it is opened."""
    folder = Path(folder)
    files = _tensor_files(folder)
    name = next((name for name in NAMES if name in files), None)
    if name is None:
        alike = sorted(n for n in files if n.endswith(".weight") and ("embed" in n or "wte" in n))
        raise ValueError(f"{folder} has no tensor that is known as an input embedding ({NAMES[0]}, {NAMES[4]}, …); its "
                         f"{len(files):,} tensors hold {', '.join(alike[:8]) or 'none named embed or wte'}: "
                         "give the folder of a decoder language model")
    if not files[name].is_file():
        raise FileNotFoundError(f"{folder} has no {files[name].name}, which holds {name}: download the folder again")
    with _opened(files[name]) as file:
        matrix = file.get_tensor(name)
    if matrix.dim() != 2 or matrix.dtype not in FLOATS:
        raise ValueError(f"{folder}: {name} is {str(matrix.dtype).removeprefix('torch.')} {list(matrix.shape)}, needed is a matrix of "
                         "float32, bfloat16 or float16: give weights that are not quantized")
    checksum = hashlib.sha256(matrix.contiguous().view(torch.uint8).numpy().data).hexdigest()[:16]
    return Embedding(matrix, name, checksum)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → file, from the index or the only file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return {name: folder / file for name, file in _json(index)["weight_map"].items()}
    if not single.is_file():
        what = "has neither model.safetensors nor its index" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"{folder} {what}: give a Hugging Face model folder with safetensors weights")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except Exception as error:  # safetensors raises a class of its own
        raise ValueError(f"{path} is no whole safetensors file ({error}): download it again") from error


def text_ids(folder: Path) -> Tensor:
    """Ids that the folder's tokenizer makes from plain text: [n] int64, ascending. From tokenizer.json, else vocab.json, else a
    SentencePiece tokenizer.model."""
    def read_json(name: str) -> Any:
        return _json(folder / name) if (folder / name).is_file() else {}
    fast, settings = read_json("tokenizer.json"), read_json("tokenizer_config.json")
    if fast:
        vocab = fast["model"]["vocab"]  # piece → id, or for Unigram [piece, score] by id
        pieces: dict[str, int] = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    elif (folder / "vocab.json").is_file():
        pieces = read_json("vocab.json")
    elif (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor
        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())
                  if not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i))}
    else:
        raise FileNotFoundError(f"{folder} has none of tokenizer.json, vocab.json, tokenizer.model: put the tokenizer beside the weights")
    named = [settings.get(name) for name in SPECIAL]
    special = {n["content"] if isinstance(n, dict) else n for n in named if n}
    added = {pieces[piece] for piece in special if piece in pieces} | set(read_json("added_tokens.json").values())
    added |= {int(i) for i in settings.get("added_tokens_decoder", {})} | {token["id"] for token in fast.get("added_tokens", ())}
    ids = sorted(set(pieces.values()) - added)
    if not ids:
        raise ValueError(f"{folder}: its tokenizer has no token that stands for text: give a language model's folder")
    return torch.tensor(ids)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error


# Choice ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def select(rows: TextRows, count: int, how: Literal["spread", "random", "farthest"] = "spread", seed: int = 0) -> TextRows:
    """K = `count` rows. spread: those with the largest mean squared distance to all rows, which far-apart rows have and near
    doubles share. random: by seed. farthest: greedily, each the farthest from those taken, which keeps rows apart from one another but
    costs K · V' · D: 2 · 10¹⁵ operations for 4,096 of 150,000 rows of 1,536."""
    if len(rows) < count:
        raise ValueError(f"{rows.source} has {len(rows):,} usable text rows, the text table asks for {count:,}, one a code: lower "
                         "codebook_size, use more books, or another table than text")
    if how == "spread":
        picks = spread(rows.embedding).topk(count).indices
    elif how == "random":
        picks = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    elif how == "farthest":
        picks = farthest(rows.embedding, count)
    else:
        raise ValueError(f"text rows are chosen by spread, random or farthest, not {how!r}")
    picks = picks.sort().values
    return replace(rows, embedding=rows.embedding[picks], ids=rows.ids[picks.to(rows.ids.device)])


def spread(x: Tensor) -> Tensor:
    """Mean squared distance of each row to all: x [V', D] → float64 [V']. With ē the mean row, 1/V' Σ_j |e − e_j|² =
    |e|² − 2 e · ē + mean |e_j|² = |e − ē|² + mean |e_j − ē|²: O(V' D), no matrix of pairs."""
    mean = x.mean(0, dtype=torch.float64)
    square = torch.cat([(part - mean).square().sum(-1) for part in x.split(ROWS)])
    return square + square.mean()


def farthest(x: Tensor, count: int, pool: int = 1024) -> Tensor:
    """Greedy farthest points (Gonzalez 1985, doi:10.1016/0304-3975(85)90224-5), the row farthest from the mean first: [V', D] → [count].

    A row's distance to what is taken only falls. So among the `pool` farthest rows the greedy choice is exact as long as one of them stays
    beyond the farthest row outside, and all rows meet what was taken since in one matrix product a round instead of a pass a pick."""
    x = x - x.mean(0)
    square = x.square().sum(-1)
    taken = [int(square.argmax())]
    away, new = torch.full_like(square, torch.inf), list(taken)
    while len(taken) < count:
        for first, part in _parts(x):
            near = (square[first:first + len(part), None] + square[new] - 2 * part @ x[new].T).amin(-1)
            away[first:first + len(part)].clamp_(max=near)
        away[new] = -torch.inf  # taken, even where a double of it is left
        top = away.topk(min(pool + 1, len(x)))
        bound = top.values[-1] if len(x) > pool else torch.tensor(-torch.inf)
        rows, left, new = top.indices[:pool], top.values[:pool].clone(), list[int]()
        while len(taken) < count and (not new or left.max() >= bound):
            best = left.argmax()
            pick = int(rows[best])
            taken.append(pick)
            new.append(pick)
            left = torch.minimum(left, square[rows] + square[pick] - 2 * x[rows] @ x[pick])
            left[best] = -torch.inf
    return torch.tensor(taken, device=x.device)


def _parts(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    yield from ((first, x[first:first + ROWS]) for first in range(0, len(x), ROWS))
