"""Which checkpoints a directory holds, found without importing torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.errors import UserError

_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
FORMAT = 1
META, INDEX = "meta.json", "index.json"
"""What a checkpoint is, and where which part of which tensor lies."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. ``sequence`` counts the checkpoints of a run directory in the order of writing."""

    path: Path
    step: int
    sequence: int


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """All complete checkpoints in a directory in the order in which they were written."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        try:
            found.append(Checkpoint(path, int(match[1]), int(read_header(path)["sequence"])))
        except UserError:
            if path.exists():  # else a run that is under way has just rotated it away
                raise
    return sorted(found, key=lambda checkpoint: checkpoint.sequence)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a complete checkpoint."""
    return (path / META).is_file() and (path / INDEX).is_file()


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run directory."""
    if (path / META).exists():
        return path
    for root in (path / "checkpoints", path):
        found = list_checkpoints(root) if root.is_dir() else []
        if found:
            return found[-1].path
    raise UserError(f"{path} is no checkpoint and no run directory with a complete checkpoint in it.")


def read_header(path: Path) -> dict[str, Any]:
    """What ``meta.json`` holds; UserError where it is missing, damaged, or of another format."""
    try:
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no complete checkpoint: its {META} cannot be read ({error}).") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {meta.get('format')}, this kinema reads format {FORMAT}.")
    return meta


def tensor_names(path: Path) -> tuple[str, ...]:
    """Names of the tensors in a checkpoint; nested names are joined with dots. UserError where that cannot be read."""
    try:
        return tuple(dict(json.loads((path / INDEX).read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(index_problem(path, error)) from error


def index_problem(path: Path, error: Exception) -> str:
    """What to say of a checkpoint whose index cannot be read."""
    return (
        f"checkpoint {path}: its {INDEX} cannot be read ({error}). Resume from another checkpoint, or copy this one "
        "again from where it came from."
    )
