"""Raw shards without the pictures and texts that rules refuse, or whose scores are too low."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from data import shards
from data.curate import scores
from data.curate.parts import OnLoss, Place, pictures, texts, without
from data.curate.pictures import PictureRules, check_picture
from data.curate.rewrite import Judge, Report, Sample, content_of, rewrite
from data.curate.scores import Name, Scored
from data.curate.texts import TextRules, banned_words, check_form, check_words
from data.curate.workers import Tell, silent
from data.skipped import Skipped


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The least score of a picture: a number, or what the best share of all pictures reach."""

    least: float | None = None
    """None: any score."""
    top: float | None = None
    """Share of the pictures with a score, in (0, 1]; None: all. With `least`, both must be reached."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is refused, and what becomes of a document that loses a part."""

    pictures: PictureRules = field(default_factory=PictureRules)
    texts: TextRules = field(default_factory=TextRules)
    scores: Path | None = None
    """Folder that `mmllm data score` wrote for these shards; None: scores are not asked for."""
    clip: Limit = field(default_factory=Limit)
    """Least cosine of picture and text. A picture without a score stays."""
    aesthetic: Limit = field(default_factory=Limit)
    """Least score of how much people would like it."""
    on_loss: OnLoss = "document"
    """A refused picture or text: "document" drops the document, "part" leaves it out where others of its kind are left. A caption or a
    question is left out alone, a conversation is dropped whole."""


def filter_shards(source: Sequence[Path], out: Path, rules: Rules, processes: int = 1, progress: Tell = silent) -> Report:
    """→ what was kept and dropped. Errors: ValueError, FileNotFoundError; `workers.ProcessFailed`."""
    paths = [scores.scores_path(rules.scores, path) for path in source] if rules.scores else []
    least: dict[Name, float] = {}
    for name in scores.NAMES:
        limit = rules.clip if name == "clip" else rules.aesthetic
        if limit != Limit():
            if not paths:
                raise ValueError(f"a least {name} score is asked for, but no scores: name the folder that `mmllm data score` wrote")
            reached = [] if limit.top is None else [scores.threshold_of_top(paths, name, limit.top)]
            least[name] = max(reached if limit.least is None else [limit.least, *reached])
    if rules.texts.banned:
        banned_words(rules.texts.banned)
    settings = {"command": "filter", "pictures": asdict(rules.pictures), "on_loss": rules.on_loss, "least": least,
                "texts": {**asdict(rules.texts), "banned": content_of(rules.texts.banned)},
                "scores": content_of(rules.scores / "settings.json") if rules.scores and least else None}
    judge_of = partial(_judge_of, rules=replace(rules, scores=rules.scores if least else None), least=least)
    return rewrite(source, out, judge_of, settings, processes, progress)


def _judge_of(path: Path, rules: Rules, least: Mapping[Name, float]) -> Judge:
    known: Mapping[str, Scored] | None = None
    if rules.scores is not None:
        place = scores.scores_path(rules.scores, path)
        known = {scored.key: scored for scored in scores.read(place)}

    def judge(sample: Sample, noted: Skipped) -> Sample:
        document = shards.document_of(sample)
        scored = None
        if known is not None:
            scored = known.get(document.key)
            if scored is None:  # no ValueError, which would drop the document
                raise FileNotFoundError(f"{rules.scores} has no scores of {path.name}/{document.key}: score the shards as they are now")
        refused: dict[Place, ValueError] = {}

        def ask(place: Place, check: Callable[[], None]) -> None:
            try:
                check()
            except ValueError as error:
                refused.setdefault(place, error)

        for number, (place, file) in enumerate(pictures(document)):
            ask(place, partial(check_picture, file, rules.pictures))
            if scored is not None:
                ask(place, partial(check_scores, scored, number, least))
        for place, text in texts(document):
            if place.field != "questions" and not document.roles:
                ask(place, partial(check_form, text, rules.texts))
            ask(place, partial(check_words, text, rules.texts))
        return without(sample, document, refused, rules.on_loss, noted)
    return judge


def check_scores(scored: Scored, number: int, least: Mapping[Name, float]) -> None:
    """Errors: ValueError "cause: …" for a picture, number `number` of its document, with a score that is too low or refused."""
    if number < len(scored.refused) and (why := scored.refused[number]):
        raise ValueError(why)
    for name, threshold in least.items():
        values = getattr(scored, name)
        value = values[number] if number < len(values) else None
        if value is not None and value < threshold:
            raise ValueError(f"low {name} score: {value:.4f}, under {threshold:.4f}")
