"""Names of classes: what a label is called and which number it has."""

import json
from pathlib import Path

USUAL = ("classes.txt", "classes.json", "classnames.txt", "class_names.txt", "labels.txt")


def class_names(path: Path | None, source: Path) -> dict[str, tuple[int, str]]:
    """{label as data has it: (number, name)}: of lines, a list, or an object whose keys are labels. Empty where there is none.
    Errors: ValueError for a file that is neither."""
    if path is None:
        path = next((source / name for name in USUAL if (source / name).is_file()), None)
    if path is None:
        return {}
    try:
        text = path.read_text("utf-8-sig")
        found = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} holds no class names: {error}") from error
    pairs = list(enumerate(found)) if isinstance(found, list) else list(found.items()) if isinstance(found, dict) else []
    names = dict[str, tuple[int, str]]()
    for at, (label, name) in enumerate(pairs):
        words = str(name[-1] if isinstance(name, list) and name else name).strip()  # {"0": ["n01440764", "tench"]}
        if not words:
            raise ValueError(f"{path} holds no class names: {label!r} has none; give a line each, or JSON {{label: name}}")
        names[str(label)] = (int(label) if str(label).isdigit() else at, words)
    for number, name in list(names.values()):
        names.setdefault(name, (number, name))
    return names
