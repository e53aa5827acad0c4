"""Files that are whole or not there."""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(path: Path, *, by_many: bool = False) -> Generator[Path]:
    """Where to write what becomes `path` when the block ends well; when it does not, `path` stays as it was.

    A killed process leaves `NAME.partial` behind, which the next one writes over. by_many: processes may write the same file at once,
    so each has a name of its own beside it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial" if by_many else f"{path.name}.partial")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, by_many: bool = False) -> None:
    """Indented; as `written`."""
    with written(path, by_many=by_many) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
