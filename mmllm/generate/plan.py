"""How a row is continued: sampling by modality, guidance, and budgets that never cut a picture."""

import math
from dataclasses import dataclass, field

from mmllm.generate.sample import Sampling

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rows are continued."""

    text: Sampling = GREEDY
    """Sampling of text."""
    image: Sampling = field(default_factory=Sampling)
    """Sampling of image codes."""
    guidance: float = 1.0
    """Image logits are blank + guidance × (seen − blank), where blank sees no text; 1 needs no second row."""
    negative: str = ""
    """What guidance leads away from: blank sees this instead of nothing."""
    max_text: int = 64
    """Text tokens a row may add. Pictures do not count, and none is cut."""
    max_pictures: int = 0
    """Pictures a row may begin."""
    max_s: float = math.inf
    """Seconds until text stops and no picture is begun; one that is begun is finished."""
    only_picture: bool = False
    """The prompt ends inside a picture; stop with its last code."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance) or min(self.max_text, self.max_pictures) < 0 or not self.max_s >= 0:
            raise ValueError(f"guidance {self.guidance} must be a number, max_text {self.max_text}, max_pictures {self.max_pictures} and "
                             f"max_s {self.max_s} at least 0")

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0 and (self.only_picture or self.max_pictures > 0)

    def most(self, longest: int) -> int:
        """Ids that a row may add, where a picture has at most `longest`."""
        return longest * (self.max_pictures + self.only_picture) + (0 if self.only_picture else self.max_text)
