"""What an evaluation is asked for: no library is imported here, so the command line knows it at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args


@dataclass(frozen=True, kw_only=True)
class VisualEvaluation:
    """What a visual tokenizer is measured with. What has no weights is not measured, and the report says so."""

    inception: Path | None = None
    """Weights of the FID Inception network (torch-fidelity's file): rfid, pfid."""
    clip_name: str | None = None
    """An open_clip model such as ViT-B-16 or ViT-L-14@openai: fid_clip:NAME, pfid_clip:NAME, zero-shot accuracy."""
    clip_weights: Path | None = None
    """Its checkpoint, or the folder that holds it."""
    lpips: Path | None = None
    """Weights of the LPIPS backbone (torchvision's state dict)."""
    lpips_backbone: Literal["alex", "vgg"] = "alex"
    """Which network they are of; the score is lpips_NAME."""
    font: Path | None = None
    """TrueType font of the words that are read back; none is PIL's own."""
    limit: int | None = None
    """Pictures to measure, spread evenly over the source; none is all."""
    prefix: str | None = None
    """Tars whose names start so; none is seen-* where there are any, else all."""
    label: str = "meta.label"
    """Where KEY.json names a picture's class, keys joined by dots. KEY.cls and sub-folders of a folder name classes too."""
    batch: int = 64
    """Pictures at once."""
    seed: int = 0
    """Of the perturbation and of the words."""
    device: str | None = None
    """cpu, cuda, …; none is cuda where there is one."""

    def __post_init__(self) -> None:
        if (self.clip_name is None) != (self.clip_weights is None):
            raise ValueError(f"clip_name is {self.clip_name} and clip_weights {self.clip_weights}: give both --clip-name and "
                             "--clip-weights, or neither")
        for name, value in (("limit", self.limit), ("batch", self.batch)):
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value}: a covariance needs 2 pictures or more")


Work = Literal["captions", "questions", "retrieval", "perplexity", "scenes", "pictures", "geneval", "text", "served"]
"""Tasks in the order of the report; `mmllm.evaluate.tasks` says what each is."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model folder is measured with. What cannot be measured is left out, and the report says why."""

    tasks: tuple[Work, ...] = get_args(Work)
    """captions: BLEU, CIDEr, ROUGE. questions: answers by type. retrieval: the right text of a picture, the right picture of a text, by
    likelihood. perplexity: by modality. scenes: drawing, skill by skill (shards of scenes). pictures: FID and CLIP score of what is drawn
    from captions. geneval: pictures in GenEval's layout. text: lm-evaluation-harness. served: questions asked through a server."""
    prefix: str | None = None
    """Shards whose names start so; none is all but train-*."""
    limit: int = 200
    """Documents of each split."""
    prompts: int = 50
    """Prompts of each skill and split of scenes."""
    candidates: int = 32
    """Pictures and texts among which the right one is to be found."""
    seed: int = 0
    """Of what is drawn, and of the resamples."""
    temperature: float = 0.3
    """Of image codes. Answers take the likeliest token."""
    guidance: float = 1.0
    """How much more than without the text; 1 is none."""
    max_text: int = 64
    """Tokens of an answer."""
    words: Literal["plain", "ptb"] = "plain"
    """What captions are cut into: lower-case words without punctuation; or Penn Treebank's tokens as COCO's scores use them, which needs
    java."""
    inception: Path | None = None
    """Weights of the FID Inception network (torch-fidelity's file): fid."""
    clip_name: str | None = None
    """An open_clip model such as ViT-B-32: clip_score, fid_clip:NAME."""
    clip_weights: Path | None = None
    """Its checkpoint."""
    geneval: Path | None = None
    """GenEval's prompts, evaluation_metadata.jsonl: pictures for its scorer are written to OUT/geneval."""
    geneval_n: int = 4
    """Pictures a prompt of GenEval."""
    geneval_results: Path | None = None
    """results.jsonl of GenEval's scorer on those pictures, to report with intervals."""
    lm_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness. Their data must be on this machine: nothing is downloaded."""
    lm_folder: Path | None = None
    """Folder with definitions (YAML) of further ones."""
    lm_limit: int | None = None
    """Examples of each; none is all."""
    server: str | None = None
    """Address of a server that holds the model, http://127.0.0.1:8000/v1: questions are asked there as lmms-eval asks them."""
    resamples: int = 2_000
    """Of the bootstrap."""
    batch: int = 64
    """Documents or prompts at once."""
    processes: int = 1
    """Each with a model of its own, on a GPU of its own where there are several."""
    device: str | None = None
    """cpu, cuda, …; none is cuda where there is one."""

    def __post_init__(self) -> None:
        if (self.clip_name is None) != (self.clip_weights is None):
            raise ValueError(f"clip_name is {self.clip_name} and clip_weights {self.clip_weights}: give both --clip-name and "
                             "--clip-weights, or neither")
        least = {"limit": 1, "prompts": 1, "candidates": 2, "geneval_n": 1, "resamples": 100, "batch": 1, "processes": 1, "max_text": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, the least is {low}: give a larger --{name.replace('_', '-')}")
