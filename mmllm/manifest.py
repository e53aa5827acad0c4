"""The list of a checkpoint's files with their sizes and hashes, written last: what it lists is whole, or it is refused."""

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks a file or holds a changed one."""
    manifest_path = checkpoint / MANIFEST
    advice = f"delete {checkpoint} to continue from the one before, or restore the file"
    if not manifest_path.is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} has no {MANIFEST}: {advice}")
    for name, entry in json.loads(manifest_path.read_text())["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint {checkpoint} is missing the file {name}: {advice}")
        if path.stat().st_size != entry["bytes"] or digest(path) != entry["sha256"]:
            raise ValueError(f"checkpoint {checkpoint}: the file {name} is not the one that was saved: {advice}")
