"""A pretrained vision tower of open_clip, timm or Hugging Face behind one call: pictures → (pooled, patch features).

All three run a list of blocks over patch tokens, behind some class or register tokens. So one hook reads the features everywhere: the last
block's output under the final norm, or another block's as it is (TokenFlow and TA-Tok distil from the last but one).

Letters: b batch, H W picture, P patch size, gh gw grid (H / P, W / P), c width, d pooled width.
"""

import difflib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tokenizer import clip_halves
from tokenizer.clip_halves import CLIP_STATISTICS, Statistics
from tokenizer.tower_source import Source, fill, parse, read_weights, weights_in

HALF: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HF = {  # model_type: class, blocks, final norm, statistics of a folder that states none
    "siglip": ("SiglipVisionModel", "encoder.layers", "post_layernorm", HALF),
    "siglip2": ("Siglip2VisionModel", "encoder.layers", "post_layernorm", HALF),
    "clip": ("CLIPVisionModelWithProjection", "vision_model.encoder.layers", "vision_model.post_layernorm", CLIP_STATISTICS),
    "dinov2": ("Dinov2Model", "encoder.layer", "layernorm", IMAGENET),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "encoder.layer", "layernorm", IMAGENET),
    "dinov3_vit": ("DINOv3ViTModel", "model.layer", "norm", IMAGENET),
}


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where in a library's module things are."""

    blocks: str
    """Path of the list of blocks."""
    norm: str
    """Path of the norm behind the last block; empty where the library has none for patches."""
    prefix: int
    """Class and register tokens before the patches."""
    patch_size: int
    """P"""
    width: int
    """c"""
    pooled_width: int
    """d"""
    statistics: Statistics
    """Mean and standard deviation of each channel, of values in [0, 1], that pictures are normalized with."""


class Tower(nn.Module):
    """A vision tower. Frozen and in eval mode as loaded; unfreeze it to train it."""

    scale: Tensor
    """[3, 1, 1] with `shift`: (x / 2 + 1 / 2 − mean) / std"""
    shift: Tensor

    def __init__(self, model: nn.Module, anatomy: Anatomy, source: Source, layer: int | None = None) -> None:
        super().__init__()
        self.model, self.anatomy, self.source = model, anatomy, source
        depth = len(cast(nn.ModuleList, model.get_submodule(anatomy.blocks)))
        if layer is not None and not -depth <= layer < depth:
            raise ValueError(f"tower {source} has {depth} blocks and no layer {layer}: give one from {-depth} to {depth - 1}")
        self.block = f"{anatomy.blocks}.{(-1 if layer is None else layer) % depth}"
        self.norm = anatomy.norm if layer is None else ""
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in anatomy.statistics)
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    @classmethod
    def load(cls, text: str, layer: int | None = None) -> "Tower":
        """text: see `tokenizer.tower_source`. layer: features are this block's output (−2: the last but one's), without the final norm."""
        source = parse(text)
        model, anatomy = {"open_clip": _open_clip, "timm": _timm, "hf": _hugging_face}[source.library](source)
        return cls(model, anatomy, source, layer).eval().requires_grad_(False)

    @property
    def name(self) -> str:
        return str(self.source)

    @property
    def patch_size(self) -> int:
        """P"""
        return self.anatomy.patch_size

    @property
    def width(self) -> int:
        """c"""
        return self.anatomy.width

    @property
    def pooled_width(self) -> int:
        """d"""
        return self.anatomy.pooled_width

    def describe(self, folder: Path) -> str:
        """What builds the tower again without its weights; what a Hugging Face folder says of it is copied into `folder`/tower."""
        if self.source.library != "hf":
            return f"{self.source}:random"
        (folder / "tower").mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
            if (Path(self.source.name) / name).is_file() and Path(self.source.name) != folder / "tower":
                shutil.copyfile(Path(self.source.name) / name, folder / "tower" / name)
        return "hf:FOLDER/tower:random"

    def hidden(self, images: Tensor, layers: int = 4) -> list[Tensor]:
        """[b, 3, H, W] → patch features [b, gh · gw, c] of so many blocks, evenly spread, the last one included: what a
        discriminator reads."""
        blocks = cast(nn.ModuleList, self.model.get_submodule(self.anatomy.blocks))
        chosen, seen = [blocks[len(blocks) * (i + 1) // layers - 1] for i in range(layers)], list[Any]()
        hooks = [block.register_forward_hook(lambda _module, _args, out: seen.append(out)) for block in chosen]
        try:
            self._pooled(images * self.scale + self.shift, (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size))
        finally:
            for hook in hooks:
                hook.remove()
        return [(out[0] if isinstance(out, tuple) else out)[:, self.anatomy.prefix:] for out in seen]

    def expect(self, width: int, knob: str) -> None:
        """Refuse features of another width before training starts. knob: the field that sets `width`."""
        if width != self.width:
            raise ValueError(f"tower {self.name} has features of {self.width} dims, {knob} says {width}: "
                             f"set {knob} to {self.width} or name another tower")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 3, H, W] in [-1, 1], sides any multiples of P → pooled [b, d], features [b, gh · gw, c]."""
        h, w = images.shape[-2:]
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(f"pictures of {h}x{w} px do not divide into the {self.patch_size} px patches of tower {self.name}: "
                             "resize them with data.images.fit")
        seen = list[Tensor]()

        def keep(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            seen.append(out)
        # for this call only: a hook that stayed would go along when the tower is copied and write into the original's list
        with self.model.get_submodule(self.block).register_forward_hook(keep):
            pooled = self._pooled(images * self.scale + self.shift, (h // self.patch_size, w // self.patch_size))
        features = self.model.get_submodule(self.norm)(seen[0]) if self.norm else seen[0]
        return pooled, features[:, self.anatomy.prefix:]

    def _pooled(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The whole tower with its positions for this grid: normalized pictures → [b, d]."""
        if self.source.library == "timm":
            return self.model(x)
        if self.source.library == "open_clip":
            return functional_call(self.model, clip_halves.positions(self.model, grid, self.name), (x,))
        kind = type(self.model).__name__
        if kind.startswith("Siglip2"):  # NaFlex reads patches [b, gh · gw, P · P · 3] and the grid that they come from
            patches = F.unfold(x, self.patch_size, stride=self.patch_size).mT  # [b, gh · gw, 3 · P · P]
            patches = patches.unflatten(-1, (3, -1)).mT.flatten(-2)
            out = self.model(patches, pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=x.device),
                             spatial_shapes=torch.tensor([grid] * len(x)))
        else:
            out = self.model(x) if kind.upper().startswith("DINO") else self.model(x, interpolate_pos_encoding=True)
        pooled = out.image_embeds if kind.endswith("Projection") else out.pooler_output
        return out.last_hidden_state.mean(1) if pooled is None else pooled  # SigLIP saved without its pooling head


def _open_clip(source: Source) -> tuple[nn.Module, Anatomy]:
    half = clip_halves.load(source, "vision")
    tower = cast(Any, half.tower)
    if hasattr(tower, "trunk"):  # timm's
        trunk = tower.trunk
        _check_vit(trunk, source)
        trunk.patch_embed.strict_img_size = False
        return tower, Anatomy(blocks="trunk.blocks", norm="trunk.norm", prefix=trunk.num_prefix_tokens, width=trunk.embed_dim,
                              patch_size=trunk.patch_embed.feat_ratio(), pooled_width=half.embed_dim, statistics=half.statistics)
    if not hasattr(tower, "transformer"):
        raise ValueError(f"{source} is no vision transformer ({type(tower).__name__}): it has no patch features")
    norm = "ln_post" if tower.attn_pool is None and not tower.final_ln_after_pool else ""
    return tower, Anatomy(blocks="transformer.resblocks", norm=norm, prefix=1, patch_size=tower.patch_size[0],
                          width=tower.conv1.out_channels, pooled_width=half.embed_dim, statistics=half.statistics)


def _timm(source: Source) -> tuple[nn.Module, Anatomy]:
    import timm

    if not timm.is_model(source.name.split(".")[0]):
        near = difflib.get_close_matches(source.name, timm.list_models())
        raise ValueError(f"timm {timm.__version__} knows no model {source.name}: it has {', '.join(near) or 'nothing like it'}")
    try:
        model = cast(Any, timm.create_model(source.name, pretrained=False, num_classes=0, dynamic_img_size=True))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} takes no pictures of any size ({error}): name a vision transformer") from error
    _check_vit(model, source)
    if source.weights:
        classifier = model.pretrained_cfg.get("classifier") or ()  # name or names of what reads classes off: of no use here
        heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
        fill(model, {k: v for k, v in read_weights(source.weights).items() if not k.startswith(heads)}, source.weights, str(source))
    return model, Anatomy(blocks="blocks", norm="norm", prefix=model.num_prefix_tokens, patch_size=model.patch_embed.feat_ratio(),
                          width=model.embed_dim, pooled_width=model.num_features,
                          statistics=(model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))


def _check_vit(model: Any, source: Source) -> None:
    if not all(hasattr(model, part) for part in ("blocks", "norm", "patch_embed", "num_prefix_tokens")):
        raise ValueError(f"{source} is no vision transformer ({type(model).__name__}): it has no patch features")


def _hugging_face(source: Source) -> tuple[nn.Module, Anatomy]:
    import transformers

    folder = Path(source.name)
    described = json.loads((folder / "config.json").read_text())
    kind = str(described.get("model_type")).removesuffix("_vision_model")
    if kind not in HF:
        raise ValueError(f"{folder} holds a model of type {kind}: a tower is one of {', '.join(HF)}")
    class_name, blocks, norm, statistics = HF[kind]
    if "CLIPVisionModel" in (described.get("architectures") or ()):  # saved without the projection
        class_name, blocks, norm = "CLIPVisionModel", blocks.removeprefix("vision_model."), norm.removeprefix("vision_model.")
    build = getattr(transformers, class_name)
    if source.weights is None:
        model = build(build.config_class.from_pretrained(folder))
    else:
        weights_in(folder)
        loud = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # or it lists every tensor of the text tower, which is left out
        try:
            model, report = build.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # of safetensors, pickle, torch and transformers, over several lines
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"{folder} cannot be read as {class_name} ({first}): download it again") from error
        finally:
            transformers.logging.set_verbosity(loud)
        if report["missing_keys"]:
            raise ValueError(f"{folder} lacks {len(report['missing_keys'])} tensors of {class_name}, such as "
                             f"{min(report['missing_keys'])}: give the folder of a whole vision tower")
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if path.is_file():
            stated = json.loads(path.read_text())
            stated = stated.get("image_processor", stated)
            statistics = (stated["image_mean"], stated["image_std"]) if "image_mean" in stated else statistics
    c = model.config
    return model, Anatomy(blocks=blocks, norm=norm, prefix=0 if kind.startswith("siglip") else 1 + getattr(c, "num_register_tokens", 0),
                          patch_size=c.patch_size, width=c.hidden_size, statistics=statistics,
                          pooled_width=c.projection_dim if class_name.endswith("Projection") else c.hidden_size)
