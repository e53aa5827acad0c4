"""What a training of the visual tokenizer is told: frozen dataclasses, and one check of what must fit together."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from mmllm.runs.train_teacher import TeacherTraining
from tokenizer.model import TokenizerConfig
from tokenizer.objective import Weights


@dataclass(frozen=True, kw_only=True)
class Gan:
    """Adversarial training of the pixel decoder."""

    weight: float = 0.0
    """Of the generator's hinge loss, over the adaptive weight; 0 trains without."""
    kind: Literal["patch", "features"] = "patch"
    """PatchGAN, or heads on the features of a frozen tower (`tower`)."""
    tower: str = ""
    """Pretrained tower of the heads, as tokenizer/tower_source.py names it."""
    channels: int = 64
    """Of the PatchGAN's first layer."""
    layers: int = 3
    """Of the PatchGAN that halve the picture."""
    start: int = 0
    """Step of the stage at which it begins."""
    warmup_steps: int = 2_000
    """Steps over which its weight grows from 0."""
    lr: float = 2e-5
    """Learning rate of the discriminator's AdamW."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Its decay rates."""
    lecam: float = 0.001
    """Weight of the LeCam term."""
    augment: bool = True
    """Show the discriminator augmented pictures (colour, translation, cutout)."""


@dataclass(frozen=True, kw_only=True)
class Perturb:
    """Codes replaced by neighbours before the pixel decoder sees them (tokenizer/perturb.py)."""

    beta: float = 0.0
    """Share of pictures; 0 leaves it out."""
    alpha: tuple[float, float] = (1.0, 0.5)
    """Share of a picture's codes, at the first step and at the last, linear between."""
    neighbours: int = 100
    """Nearest entries to choose from."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps of one stage and what they minimise."""

    steps: int = 0
    """Optimizer steps; 0 leaves the stage out."""
    lr: float = 3e-4
    """Highest learning rate of AdamW; linear warmup, then cosine."""
    tower_lr: float = 0.1
    """Learning rate of a pretrained semantic tower and of a text tower, over `lr`."""
    warmup_steps: int = 20
    """Steps of warmup."""
    min_lr_ratio: float = 0.0
    """The cosine ends at this part of the highest rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """Of matrices; tables, norms and biases have none."""
    clip_grad: float = 0.0
    """Largest norm of the whole gradient; 0 for no limit."""
    weights: Weights = field(default_factory=Weights)
    """Of the losses."""
    gan: Gan = field(default_factory=Gan)
    """Adversarial training."""
    perturb: Perturb = field(default_factory=Perturb)
    """Latent perturbation."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What codebooks start from: k-means over latents."""

    patches: int = 60_000
    """Positions, about; 0 leaves the tables random."""
    rounds: int = 15
    """Rounds of k-means."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Sizes and steps of a tokenizer's training, wherever its pictures are.

    Two stages: `align` trains everything; `decode` freezes all that decides a code and trains the pixel decoder on."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    teacher: TeacherTraining = field(default_factory=TeacherTraining)
    """A small CLIP trained first, whose tower becomes the semantic tower and the teacher; 0 steps leaves it out."""
    teacher_source: str = ""
    """A frozen pretrained teacher, as tokenizer/tower_source.py names it; the semantic tower as it was at the start if empty."""
    text_rows: Path | None = None
    """Hugging Face folder of the language model whose input embedding the semantic table is made of; the small CLIP's if None."""
    text_selection: Literal["spread", "random", "farthest"] = "spread"
    """Which of its rows."""
    text_tower: str = ""
    """Pretrained text tower of the contrastive loss, open_clip:NAME:WEIGHTS; one of tower's sizes over our text pieces if empty."""
    contrast: Literal["sigmoid", "softmax"] = "sigmoid"
    """Kind of the contrastive loss."""
    balance_steps: int = 0
    """Steps for which the semantic and contrastive losses are balanced against reconstruction by gradient norms; then their weights
    stay. 0 leaves the weights as given."""
    balance_every: int = 100
    """Steps between two measurements."""
    perceptual: Literal["none", "edges", "vgg", "alex"] = "none"
    """Perceptual loss: LPIPS on a backbone, or differences of edges, which need no weights."""
    perceptual_weights: Path | None = None
    """Weights of the LPIPS backbone, a torchvision state dict."""
    start: Start = field(default_factory=Start)
    """Codebooks before the first step."""
    align: Stage = field(default_factory=lambda: Stage(steps=100))
    """Encoders, quantizer and decoders together."""
    decode: Stage = field(default_factory=lambda: Stage(weights=Weights(quantize=0, semantic=0)))
    """The pixel decoder on frozen codes."""
    batch: int = 64
    """Pictures a step, over all ranks."""
    micro_batch: int = 64
    """Pictures that a rank puts through the model at once."""
    scale_odds: tuple[float, ...] = ()
    """How often each scale is drawn, one for a step; evenly if empty."""
    average: float = 0.0
    """Decay of the moving average of weights that is saved in the end; 0 saves the last weights."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """What towers and decoders multiply in; the quantizer is fp32 always."""
    ranks: int = 1
    """Processes; under torchrun, its world size."""
    sharded: bool = False
    """Shard weights and optimizer over the ranks (FSDP2) instead of a copy each (DDP)."""
    workers: int = 0
    """Threads that read pictures ahead; 0 reads between steps."""
    revive_every: int = 25
    """Steps between revivals of dead codes, in the first half of `align`."""
    revive_below: float = 0.03
    """Codes used less than this part of their fair share are dead."""
    validate_every: int = 25
    """Steps between validations."""
    keep_best: bool = True
    """End `align` with the weights that validated best, not with the last."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves none until told to stop."""
    keep_last: int = 2
    """Checkpoints kept."""
    log_every: int = 25
    """Steps between log lines."""
    seed: int = 0
    """Of every draw."""


@dataclass(frozen=True, kw_only=True)
class TrainVisual:
    """Train teacher and visual tokenizer on the pairs of raw shards."""

    raw: Path
    """Folder of raw shards: train-*.tar to learn from, seen-*.tar to validate on."""
    text: Path
    """Text tokenizer, a text.model file."""
    out: Path
    """Folder for the visual tokenizer; its teacher.safetensors and its run folder are written beside it."""
    training: TrainTokenizer = field(default_factory=TrainTokenizer)
    """Sizes and steps."""

    @property
    def run(self) -> Path:
        """Metrics and checkpoints."""
        return self.out.with_name(self.out.name + "_run")

    @property
    def teacher(self) -> Path:
        return self.out.with_name("teacher.safetensors")


def violations(recipe: TrainTokenizer) -> list[str]:
    """Everything in the recipe that cannot work, a line each."""
    found = list[str]()
    model, q = recipe.model, recipe.model.quantizer

    def need(holds: bool, line: str) -> None:
        if not holds:
            found.append(line)

    need(recipe.batch >= 1 and recipe.batch % (recipe.micro_batch * recipe.ranks) == 0,
         f"batch {recipe.batch} is no multiple of micro_batch × ranks = {recipe.micro_batch} × {recipe.ranks}: change one")
    need(not recipe.scale_odds or len(recipe.scale_odds) == len(model.scales),
         f"scale_odds has {len(recipe.scale_odds)} numbers for {len(model.scales)} scales: give one each")
    need(recipe.perceptual in ("none", "edges") or (recipe.perceptual_weights is not None and recipe.perceptual_weights.is_file()),
         f"perceptual is {recipe.perceptual}, whose weights {recipe.perceptual_weights} are not there: give perceptual_weights, a "
         "torchvision state dict, or set perceptual to edges or none")
    need(recipe.teacher.steps > 0 or bool(model.tower_source) or bool(recipe.teacher_source) or model.train_tower,
         "there is no teacher: raise teacher.steps, or name teacher_source or model.tower_source")
    need(not (model.tower_source and recipe.teacher.steps),
         f"model.tower_source is {model.tower_source} and teacher.steps {recipe.teacher.steps}: the small CLIP would not be used, set "
         "teacher.steps to 0")
    if q.kind == "shared" and q.semantic_table == "text":
        need(recipe.teacher.steps > 0 or recipe.text_rows is not None,
             "quantizer.semantic_table is text, but there is no text: give text_rows, a language model's folder, or raise teacher.steps")
        need(recipe.text_rows is None or model.pixel not in ("palette", "linear") or not recipe.start.patches,
             f"text_rows is {recipe.text_rows}, but {model.pixel} patches start from phrases of the captions' own pieces: set model.pixel "
             "to conv or vit, or leave text_rows out")
    for name, stage in (("align", recipe.align), ("decode", recipe.decode)):
        if not stage.steps:
            continue
        need(not stage.weights.perceptual or recipe.perceptual != "none",
             f"{name}.weights.perceptual is {stage.weights.perceptual} but perceptual is none: set it to edges, vgg or alex")
        need(not stage.weights.entropy or q.entropy_latents > 0,
             f"{name}.weights.entropy is {stage.weights.entropy} but quantizer.entropy_latents is 0: raise it")
        need(not stage.gan.weight or stage.gan.kind == "patch" or bool(stage.gan.tower),
             f"{name}.gan.kind is features, which needs {name}.gan.tower")
        need(not stage.perturb.beta or 1 <= stage.perturb.neighbours < _entries(recipe),
             f"{name}.perturb.neighbours is {stage.perturb.neighbours}, a book has {_entries(recipe)} entries: change one")
    return found


def _entries(recipe: TrainTokenizer) -> int:
    q = recipe.model.quantizer
    if q.kind == "fsq":
        size = 1
        for level in q.levels:
            size *= level
        return size
    return q.codebook_size if q.kind in ("shared", "residual") else 2**q.bits[0]


CONTINUABLE = ("micro_batch", "ranks", "sharded", "workers", "save_every", "keep_last", "log_every")
"""Fields that a continued run may change. A step has the same pictures in the same order, and draws the same for each of them. Bits may
differ, for sums are made in another order. And terms that look at all pictures that go through together, ranks × micro_batch of them,
change with this product: the contrastive loss, entropy, ema tables, revival, balancing, adaptive weight and LeCam."""


def recipe_hash(recipe: TrainTokenizer) -> str:
    """Of what must be the same for a checkpoint to be continued."""
    fields = {name: value for name, value in asdict(recipe).items() if name not in CONTINUABLE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check(recipe: TrainTokenizer) -> None:
    """Refuse a recipe that cannot work, with every reason at once."""
    found = violations(recipe)
    if found:
        raise ValueError("the recipe cannot work:\n" + "\n".join(f"  - {line}" for line in found))
