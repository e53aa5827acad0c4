"""Low-rank adapters through peft, and the rows of embedding and output layer that are trained beside them.

The rows of control tokens and image codes lie behind those of text. Each table is split there into two modules, a frozen one and a
trained one: forward and backward then cost what they did, and optimizer states, gradients and ZeRO see only the rows that are trained.
(peft's own trainable tokens copy the whole table in every forward pass, and need CUDA under ZeRO 3 in 0.21.)

Letters: v ids, of which the first t are text, d hidden, r rank.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.hf import replaced
from mmllm.runs.sft_recipe import Sft

TABLES = ("model.embed_tokens", "lm_head")
PEFT = "base_model.model."
"""Where peft's names begin."""
ADAPTER = "adapter_config.json"


class SplitEmbedding(nn.Module):
    """Embedding [v, d] in two: ids of text, and those behind."""

    def __init__(self, whole: Tensor, first: int) -> None:
        super().__init__()
        self.text = nn.Embedding.from_pretrained(whole[:first].clone(), freeze=True)
        self.rows = nn.Embedding.from_pretrained(whole[first:].clone(), freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        first = self.text.num_embeddings
        read, trained = self.text(ids.clamp(max=first - 1)), self.rows((ids - first).clamp(min=0))
        return torch.where((ids >= first)[..., None], trained, read)


class SplitHead(nn.Module):
    """Output layer [v, d] in two likewise."""

    def __init__(self, text: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.text, self.rows = (nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta") for part in (text, rows))
        self.text.weight, self.rows.weight = text, rows

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.text(hidden), self.rows(hidden)], -1)


def adapt(causal: Any, recipe: Sft, first: int, gathered: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Freeze a causal language model of transformers, in place, but for what the recipe trains. `first`: id behind those of text;
    `gathered`: makes parameters whole that ZeRO 3 has split."""
    import peft

    lora = recipe.lora
    tied = causal.lm_head.weight is causal.model.embed_tokens.weight
    if lora.rows == "ours":
        with gathered([causal.model.embed_tokens.weight]):
            embedding = SplitEmbedding(causal.model.embed_tokens.weight.detach(), first)
        text, rows = embedding.text.weight, embedding.rows.weight
        if not tied:
            with gathered([causal.lm_head.weight]):
                whole = causal.lm_head.weight.detach()
                text, rows = nn.Parameter(whole[:first].clone(), requires_grad=False), nn.Parameter(whole[first:].clone())
        causal.model.embed_tokens, causal.lm_head = embedding, SplitHead(text, rows)
    torch.manual_seed(recipe.seed)  # A is random, and the same whatever was built before
    peft.get_peft_model(causal, _config(recipe, peft), autocast_adapter_dtype=False)
    if lora.rows != "none":
        for table in (causal.model.embed_tokens, causal.lm_head):
            (table.rows if lora.rows == "ours" else table).weight.requires_grad_(True)


def _config(recipe: Sft, peft: Any, **changes: Any) -> Any:
    lora = recipe.lora
    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets),
                           task_type="CAUSAL_LM", base_model_name_or_path=str(recipe.init), **changes)


def merged(tensors: Mapping[str, Tensor], recipe: Sft) -> dict[str, Tensor]:
    """Weights of an adapted model by name → those of the model without adapters that computes the same."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place, _, last = name.rpartition(".")
        if ".lora_" in name or place.endswith(".rows"):
            continue
        if place.endswith(".base_layer"):
            place = place.removesuffix(".base_layer")
            if last == "weight":
                a, b = (tensors[f"{place}.lora_{letter}.default.weight"] for letter in "AB")  # [r, in], [out, r]
                tensor = tensor + (recipe.lora.alpha / recipe.lora.rank) * (b @ a)
        elif place.endswith(".text"):
            place = place.removesuffix(".text")
            tensor = torch.cat([tensor, tensors[f"{place}.rows.weight"]])
        out[f"{place}.{last}"] = tensor
    return out


def write_adapter(out: Path, tensors: Mapping[str, Tensor], recipe: Sft, ids: range) -> None:
    """What was trained, as `peft.PeftModel.from_pretrained(model of init, out)` reads it. `ids`: of the rows behind text."""
    import peft
    from safetensors.torch import save_file

    saved = {PEFT + name.replace(".default", ""): tensor for name, tensor in tensors.items() if ".lora_" in name}
    tables = [table for table in TABLES if any(name.startswith(table) for name in tensors)]
    changes: dict[str, Any] = {}
    if recipe.lora.rows == "ours":
        changes["trainable_token_indices"] = {table.rpartition(".")[2]: list(ids) for table in tables}
        saved |= {f"{PEFT}{table}.token_adapter.trainable_tokens_delta": tensors[f"{table}.rows.weight"] for table in tables}
    elif recipe.lora.rows == "all":
        changes |= {"modules_to_save": [table.rpartition(".")[2] for table in tables], "ensure_weight_tying": len(tables) == 1}
        saved |= {f"{PEFT}{table}.weight": tensors.get(f"{table}.weight", tensors[f"{TABLES[0]}.weight"]).clone() for table in TABLES}
    with replaced(out, ADAPTER) as folder:
        save_file({name: tensor.contiguous() for name, tensor in saved.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
        _config(recipe, peft, inference_mode=True, **changes).save_pretrained(str(folder))
