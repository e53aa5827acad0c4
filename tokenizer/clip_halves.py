"""One tower of an open_clip model, vision or text, filled from a file.

The other one, which could be large or want a download, is built as small as can be and dropped.

Letters: gh gw patch grid, c width.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tower_source import Source, fill, read_weights, weights_in

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
CLIP_STATISTICS: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SMALLEST = {"vision_cfg": {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
            "text_cfg": {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}}
NOT_OF_A_TOWER = ("logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size")


class Half(NamedTuple):
    tower: nn.Module
    config: dict[str, Any]
    """`vision_cfg` or `text_cfg`"""
    embed_dim: int
    """of the space that pictures and texts share"""
    statistics: Statistics
    """mean and standard deviation of each channel that pictures are normalized with"""


def load(source: Source, side: Literal["vision", "text"]) -> Half:
    """Build and fill the half of a model that `source` names."""
    config, statistics = describe(source)
    half: dict[str, Any] = config[f"{side}_cfg"]
    if "hf_model_name" in half:
        raise ValueError(f"the text tower of {source} is {half['hf_model_name']}, which open_clip would download: "
                         "name a model with a text tower of open_clip's own")
    tower = build(config["embed_dim"], {f"{side}_cfg": half}, config.get("quick_gelu", False))
    if source.weights:
        path = source.weights if source.weights.is_file() else weights_in(source.weights)
        weights = {k: v for k, v in read_weights(path).items() if k not in NOT_OF_A_TOWER}
        prefix = "visual." if side == "vision" else "text."
        if side == "text" and not any(k.startswith(prefix) for k in weights):  # the older form: not below a name of its own
            weights = {prefix + k: v for k, v in weights.items() if not k.startswith("visual.")}
        fill(tower, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, path, str(source))
    return Half(tower, half, config["embed_dim"], statistics)


def build(embed_dim: int, half: dict[str, dict[str, Any]], quick_gelu: bool = False) -> nn.Module:
    """half: {"vision_cfg": …} or {"text_cfg": …} → that tower, untrained; its forward gives the pooled embedding [b, embed_dim]."""
    import open_clip

    vision = {**{**SMALLEST, **half}["vision_cfg"], "timm_model_pretrained": False}
    model = cast(Any, open_clip.CustomTextCLIP)(embed_dim, vision, {**SMALLEST, **half}["text_cfg"], quick_gelu)
    tower = model.visual if "vision_cfg" in half else model.text
    tower.output_tokens = False
    return tower


def describe(source: Source) -> tuple[dict[str, Any], Statistics]:
    """→ configuration of the whole model, mean and standard deviation. Both depend on the weights: `name@tag` says whose they are."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    folder = Path(source.name)
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(f"{folder} is no open_clip folder: it has no open_clip_config.json")
        config = json.loads((folder / "open_clip_config.json").read_text())
        stated = config.get("preprocess_cfg", {})
        return config["model_cfg"], (stated["mean"], stated["std"]) if "mean" in stated else CLIP_STATISTICS
    name, _, tag = source.name.partition("@")
    config = open_clip.get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models())
        raise ValueError(f"open_clip {open_clip.__version__} knows no model {name}: it has {', '.join(near) or 'nothing like it'}")
    tags = {each: get_pretrained_cfg(name, each) for each in list_pretrained_tags_by_model(name)}
    if tag and tag not in tags:
        raise ValueError(f"open_clip:{name} has no weights called {tag}: it has {', '.join(tags) or 'none'}")
    stated = [cast(Any, t) for each, t in tags.items() if tag in ("", each)]
    found: set[Statistics] = {(tuple(t["mean"]), tuple(t["std"])) for t in stated if t.get("mean")} or {CLIP_STATISTICS}
    if len(found) > 1 and source.weights:
        raise ValueError(f"weights of open_clip:{name} differ in mean and standard deviation: say whose these are, as {name}@TAG with one "
                         f"of {', '.join(tags)}")
    config["quick_gelu"] = config.get("quick_gelu", False) or bool(tag and tags[tag].get("quick_gelu"))
    return config, CLIP_STATISTICS if len(found) > 1 else found.pop()


def tokenizer(source: Source, text: dict[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    """Texts → ids [b, context_length] as the text tower `text` was trained with. CLIP's pieces come with open_clip; others, such as
    SigLIP's, are read from the folder of the weights."""
    from open_clip import tokenizer as pieces

    context_len: int = text.get("context_length", 77)
    if "hf_tokenizer_name" not in text:
        clip = pieces.SimpleTokenizer(context_length=context_len, **text.get("tokenizer_kwargs", {}))
        return lambda texts: clip(list(texts))
    folder = source.weights if source.weights and source.weights.is_dir() else (source.weights or Path(source.name)).parent
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer_config.json, but texts for {source} are cut by {text['hf_tokenizer_name']}'s "
                                "tokenizer: put its files beside the weights")
    own = pieces.HFTokenizer(str(folder), context_len, tokenizer_mode=text.get("tokenizer_mode"), **text.get("tokenizer_kwargs", {}))
    return lambda texts: own(list(texts))


def positions(tower: nn.Module, grid: tuple[int, int], name: str) -> dict[str, Tensor]:
    """Position embedding of a vision tower resampled to a grid, bicubic: {parameter: value}; empty on the tower's own grid."""
    trunk = cast(Any, getattr(tower, "trunk", None))
    own: tuple[int, int] = tuple((cast(Any, tower) if trunk is None else trunk.patch_embed).grid_size)
    if grid == own:
        return {}
    if trunk is not None and (getattr(trunk, "rope", None) is not None or trunk.pos_embed is None):
        raise ValueError(f"tower {name} has positions for {own[0]}x{own[1]} patches only, a picture has {grid[0]}x{grid[1]}: resize "
                         "pictures to its own size, or name the same architecture as timm:NAME")
    key = "positional_embedding" if trunk is None else "trunk.pos_embed"
    whole = tower.get_parameter(key)  # [prefix + gh · gw, c], timm's with a 1 before
    prefix, patches = whole.view(-1, whole.shape[-1]).split([whole.shape[-2] - own[0] * own[1], own[0] * own[1]])
    square = F.interpolate(patches.float().T.reshape(1, -1, *own), size=grid, mode="bicubic", antialias=True)  # [1, c, gh, gw]
    moved = torch.cat([prefix, square[0].flatten(1).T.to(prefix.dtype)])
    return {key: moved.view(*whole.shape[:-2], *moved.shape)}
