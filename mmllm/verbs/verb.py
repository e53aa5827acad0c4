"""What the command line knows of a verb: its arguments, a dataclass whose docstrings are the help, and what it runs.

The modules beside this one hold the verbs, by what they work on; heavy imports wait inside their functions."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Verb(NamedTuple):
    arguments: type
    """A dataclass; its first line says what the verb does."""
    run: Callable[[Any], None]
    """Called with an instance."""
    positional: tuple[str, ...] = ()
    """Fields that may be given as plain words, in order."""
