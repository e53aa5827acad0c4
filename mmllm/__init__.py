"""The language model and every run. Rooms beside it: `tokenizer` and `data`."""

from importlib.util import find_spec
from pathlib import Path

for _room in ("tokenizer", "data"):  # names that other projects use too: whose would be imported?
    _spec = find_spec(_room)
    _there = Path(_spec.origin).parent.parent if _spec is not None and _spec.origin else None
    if _there != Path(__file__).parent.parent:
        raise ImportError(f"the package `{_room}` beside mmllm is hidden by {_there or 'nothing that can be found'}: "
                          "install mmllm in an environment of its own, or run it from elsewhere")
