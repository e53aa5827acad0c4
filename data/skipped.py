"""What was left out, and why: a count and the first name by cause.

A refusal is a ValueError whose message starts with its cause and a colon ("too small: …"), so that refusals of one kind count
together whatever they say behind it."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Skipped:
    """Counts by cause, the first name of each."""

    causes: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, cause: str, name: str) -> None:
        self.causes[cause] += 1
        self.first.setdefault(cause, name)

    def refuse(self, error: ValueError, name: str) -> None:
        """Count a refusal by what its message starts with."""
        cause, _, rest = str(error).partition(": ")
        self.add(cause, f"{name}: {rest}" if rest else name)

    def __bool__(self) -> bool:
        return bool(self.causes)

    def __str__(self) -> str:
        return "; ".join(f"{count} × {cause} (first: {self.first[cause]})" for cause, count in self.causes.items())

    def to_json(self) -> str:
        return json.dumps({cause: [count, self.first[cause]] for cause, count in self.causes.items()}, ensure_ascii=False)

    @classmethod
    def of_json(cls, text: str) -> "Skipped":
        """Errors: ValueError for what `to_json` did not write."""
        try:
            found = {str(cause): (int(count), str(name)) for cause, (count, name) in json.loads(text).items()}
        except (AttributeError, TypeError) as error:
            raise ValueError(f"what was left out is said as {text[:80]!r}, not as causes with counts") from error
        return cls(Counter({cause: count for cause, (count, _) in found.items()}), {cause: name for cause, (_, name) in found.items()})

    @classmethod
    def joined(cls, several: Iterable["Skipped"]) -> "Skipped":
        out = cls()
        for one in several:
            out.causes += one.causes
            out.first = {**one.first, **out.first}
        return out
